"""Is there a flag for every option, and does each duration mean what it says?"""

import inspect
from dataclasses import fields

import pytest

from ollm_service.cli import jobs, plans
from ollm_service.cli.options import seconds_in
from ollm_service.core.errors import InvalidOption
from ollm_service.core.options import GenerationConfig, RuntimeConfig


@pytest.mark.parametrize("verb", [jobs.submit, plans.preview])
def test_every_option_has_a_flag(verb: object) -> None:
    """A field that is added to the options gets its flag by itself."""
    assert callable(verb)
    flags = set(inspect.signature(verb).parameters)
    assert {item.name for kind in (RuntimeConfig, GenerationConfig) for item in fields(kind)} <= flags


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), (None, None)])
def test_durations_are_read(text: str | None, seconds: float | None) -> None:
    """Seconds by default, or with a unit."""
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1w", "h", "1e3", "9" * 30])
def test_other_durations_are_refused(text: str) -> None:
    """With examples of what is allowed."""
    with pytest.raises(InvalidOption, match="15m"):
        seconds_in(text)
