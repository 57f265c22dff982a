"""Which laws hold however a job's rows are split into plans?"""

from hypothesis import given
from hypothesis import strategies as st

from ollm_service.core.splitting import ALWAYS_USUAL_TOKENS, USUAL_FACTOR, split

needs_of_rows = st.lists(st.integers(0, 2_000) | st.integers(0, 2**20), max_size=700)


@given(needs_of_rows, st.integers(1, 256))
def test_every_row_is_in_exactly_one_plan(needs: list[int], most: int) -> None:
    """No row is lost or doubled, no plan is empty or too large, and each keeps the order of its rows."""
    plans = list(split(needs, rows_per_plan=most))
    assert sorted(position for plan in plans for position in plan) == list(range(len(needs)))
    assert all(0 < len(plan) <= most for plan in plans)
    assert all(list(plan) == sorted(plan) for plan in plans)


@given(needs_of_rows.filter(bool))
def test_no_usual_row_shares_a_plan_with_a_long_one(needs: list[int]) -> None:
    """A plan with a row above the limit has none below it, and its needs stay within one factor of each other."""
    limit = max(ALWAYS_USUAL_TOKENS, USUAL_FACTOR * sorted(needs)[len(needs) // 2])
    for plan in split(needs, rows_per_plan=256):
        least, most = min(needs[row] for row in plan), max(needs[row] for row in plan)
        assert most <= limit or least > limit
        assert most <= limit or most < USUAL_FACTOR * least


@given(needs_of_rows)
def test_long_rows_cost_few_plans(needs: list[int]) -> None:
    """Apart from what the rows' number demands there is at most one plan more for each factor between limit and longest."""
    plans = list(split(needs, rows_per_plan=256))
    assert len(plans) <= len(needs) // 256 + 1 + 5
