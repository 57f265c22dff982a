"""Are long rows kept apart from the others, and rows of usual length together?"""

import pytest

from ollm_service.core.row_size import most_tokens
from ollm_service.core.splitting import ALWAYS_USUAL_TOKENS, groups, split


def test_a_few_long_rows_have_a_plan_of_their_own() -> None:
    """Of 600 rows three are far longer than the median: they come last, in a plan of their own."""
    needs = [3_000] * 600
    for long_row in (7, 211, 590):
        needs[long_row] = 40_000
    plans = list(split(needs, rows_per_plan=256))
    assert [len(plan) for plan in plans] == [256, 256, 85, 3]
    assert plans[-1] == (7, 211, 590)
    assert plans[0][:9] == (0, 1, 2, 3, 4, 5, 6, 8, 9)


def test_very_long_rows_are_kept_apart_from_long_ones() -> None:
    """Each factor of four above four times the median begins another group."""
    assert groups([1_000, 1_000, 1_000, 4_000, 5_000, 20_000, 1_000]) == [[0, 1, 2, 3, 6], [4], [5]]


def test_short_rows_are_never_split_off() -> None:
    """Whatever the median is, rows up to the threshold need too little to be worth a plan."""
    assert groups([10, 10, 10, ALWAYS_USUAL_TOKENS]) == [[0, 1, 2, 3]]
    assert groups([10, 10, 10, ALWAYS_USUAL_TOKENS + 1]) == [[0, 1, 2], [3]]
    assert groups([]) == []


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        ({"prompt": "ä"}, 2 + 64 + 10),
        ({"prompt": "ab", "generation": {"max_new_tokens": 3}}, 2 + 64 + 3),
        ({"messages": [{"role": "user", "content": "ä"}]}, 33 + 16 + 64 + 10),
        ({}, 64 + 10),
    ],
)
def test_a_row_has_at_most_as_many_tokens_as_bytes(request_: dict[str, object], tokens: int) -> None:
    """The prompt's bytes, what a template may add, and the output, which is the row's own where it sets one."""
    assert most_tokens(request_, 10) == tokens
