"""Does every error know its code, whose fault it is, and something to say?"""

from collections.abc import Iterator

import pytest

from ollm_service.core import errors
from ollm_service.core.errors import InvalidOption, OllmError, RequestError, ServiceError, printable, shown


def all_errors(kind: type[OllmError] = OllmError) -> Iterator[type[OllmError]]:
    """The error tree of the core, root first."""
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from all_errors(child)


@pytest.mark.parametrize("kind", [kind for kind in all_errors() if kind is not InvalidOption])
def test_every_error_has_a_code_and_a_default_sentence(kind: type[OllmError]) -> None:
    """The docstring is the default message; 4xx are the caller's, 5xx are ours."""
    error = kind()
    assert error.message == str(error) == kind.__doc__
    assert error.code
    assert error.status // 100 == (4 if isinstance(error, RequestError) else 5)
    assert kind is OllmError or isinstance(error, RequestError | ServiceError)


def test_codes_are_unique() -> None:
    """One code, one meaning."""
    codes = [kind.code for kind in all_errors()]
    assert len(set(codes)) == len(codes)


def test_an_invalid_option_lists_what_is_allowed() -> None:
    """In the message and as the remedy."""
    error = InvalidOption("device", "`gpu` is not known", allowed=["cpu", "cuda"])
    assert error.message == "device: `gpu` is not known. Allowed: cpu, cuda."
    assert (error.param, error.remedy) == ("device", "Allowed: cpu, cuda.")
    assert InvalidOption("device", "is wrong").remedy is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain ö", "plain ö"),
        ("a\nb\x00", "a\\nb\\x00"),
        ("\ud800\u202e", "\\ud800\\u202e"),
        ("x" * 81, "x" * 80 + "…"),
        (7, "7"),
        (True, "True"),
        (1.5, "1.5"),
        (None, "None"),
        (10**400, "a int"),
        ([1], "a list"),
        ({"a": 1}, "a dict"),
    ],
)
def test_hostile_values_are_shown_short_and_printable(value: object, text: str) -> None:
    """Nothing that a terminal, a log or a database chokes on is repeated."""
    assert shown(value) == text
    assert shown(value).isprintable()
    assert printable(text) == text
