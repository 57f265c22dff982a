"""Is there a flag for every option, and does each duration mean what it says?"""

from dataclasses import Field, fields
from typing import Any

import pytest
import typer

from ollm_service.cli.app import app
from ollm_service.cli.options import HELP, Choices, seconds_in, takes_choices
from ollm_service.core.errors import InvalidOption
from ollm_service.core.options import GenerationConfig, RuntimeConfig

FIELDS = [item for kind in (RuntimeConfig, GenerationConfig) for item in fields(kind)]


def chosen(verb: str, *flags: str) -> dict[str, Any]:
    """What a verb's flags say, as its function is given it."""
    command = typer.main.get_group(app).commands[verb]
    return dict(command.make_context(verb, ["file", *flags]).params)


@pytest.mark.parametrize("verb", ["submit", "preview"])
@pytest.mark.parametrize("item", FIELDS, ids=lambda item: item.name)
def test_every_option_has_a_flag_of_its_name(verb: str, item: Field[Any]) -> None:
    """A field of the options is a flag with dashes, on both verbs; what was not given is left open."""
    flag = f"--{item.name.replace('_', '-')}"
    assert chosen(verb)[item.name] in (None, [], ())
    if isinstance(item.default, bool):
        assert chosen(verb, flag)[item.name] is True
        assert chosen(verb, f"--no-{flag.removeprefix('--').removeprefix('use-')}")[item.name] is False
    else:
        assert chosen(verb, flag, "default")[item.name] in ("default", ["default"], ("default",))


@pytest.mark.parametrize("item", FIELDS, ids=lambda item: item.name)
def test_every_option_says_what_it_is(item: Field[Any]) -> None:
    """Each has a help text, which the page of settings shows, too."""
    assert HELP[item.name]


def test_what_was_given_is_said_and_what_was_cleared_is_null() -> None:
    """A flag that says the default says it; one that was not used leaves its option open."""
    seen: list[Choices] = []

    @takes_choices()
    def verb(choices: Choices) -> None:
        seen.append(choices)

    verb(use_cache=True, device="default", offload_cpu_layers=0, temperature=0.0, stop=[""], seed="default")
    assert seen[0].runtime == {"device": None, "use_cache": True, "offload_cpu_layers": 0}
    assert seen[0].generation == {"temperature": 0.0, "seed": None, "stop": None}
    with pytest.raises(InvalidOption, match="optimized-native"):
        verb(backend="magic")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), (None, None)])
def test_durations_are_read(text: str | None, seconds: float | None) -> None:
    """Seconds by default, or with a unit."""
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1w", "h", "1e3", "9" * 30])
def test_other_durations_are_refused(text: str) -> None:
    """With examples of what is allowed."""
    with pytest.raises(InvalidOption, match="15m"):
        seconds_in(text)
