"""Who takes which plans, and when is the last one done?"""

from hypothesis import given
from hypothesis import strategies as st

from ollm_service.core.dealing import Pile, deal


def pile(rows: int, *row_seconds: float | None, plan_rows: int = 10, load: float = 0.0) -> Pile:
    """Rows that take each worker so many seconds."""
    return Pile(rows=rows, plan_rows=plan_rows, row_seconds=row_seconds, load_seconds=(load,) * len(row_seconds))


def test_a_worker_takes_the_next_plan_when_it_is_free() -> None:
    """By hand: the fast one takes plans at 0, 10, 20, the slow one at 0 and is done with its own at 25."""
    dealt = deal([pile(40, 1.0, 2.5)], (0.0, 0.0))
    assert (dealt.seconds, dealt.rows, dealt.begins) == (30.0, (30, 10), (0.0, 0.0))


def test_the_last_plan_may_go_to_a_slow_worker() -> None:
    """It is free first: the end comes later than it would without it."""
    own = pile(20, 1.0, 100.0)
    assert deal([own], (5.0, 0.0)).seconds == 1_000.0
    alone = deal([own.without({1})], (5.0, 0.0))
    assert (alone.seconds, alone.rows, alone.begins) == (25.0, (20, 0), (5.0, None))


def test_whoever_goes_over_to_another_model_loads_it() -> None:
    """Once for all plans of a kind that it takes in a row, and for the job's own after those."""
    dealt = deal([pile(20, 1.0, load=7.0), pile(20, 1.0, load=3.0)], (0.0,))
    assert (dealt.seconds, dealt.begins) == (7 + 20 + 3 + 20, (27.0,))


def test_what_nobody_takes_delays_nobody() -> None:
    """A pile before the job's own that no worker takes, and a job that no worker takes."""
    own = pile(20, 1.0)
    assert deal([pile(1_000, None), own], (0.0,)) == deal([own], (0.0,))
    assert deal([pile(10, 1.0), pile(20, None)], (0.0,)).seconds is None


paces = st.lists(st.one_of(st.none(), st.floats(0.01, 10)), min_size=2, max_size=2)


@given(st.lists(st.tuples(st.integers(0, 500), paces), max_size=3), st.integers(1, 500), paces, st.integers(1, 50))
def test_every_row_of_the_job_is_dealt_once(
    before: list[tuple[int, list[float | None]]], rows: int, own: list[float | None], plan_rows: int
) -> None:
    """To workers that take it, each of which begins before the end; nobody else gets any."""
    piles = [pile(count, *seconds, plan_rows=plan_rows) for count, seconds in before]
    dealt = deal([*piles, pile(rows, *own, plan_rows=plan_rows)], (0.0, 1.0))
    if own == [None, None]:
        assert (dealt.seconds, dealt.rows) == (None, (0, 0))
        return
    assert dealt.seconds is not None
    assert sum(dealt.rows) == rows
    for number, seconds in enumerate(own):
        begins = dealt.begins[number]
        assert (begins is None) is (dealt.rows[number] == 0)
        assert begins is None or (seconds is not None and begins < dealt.seconds)


def test_piles_of_one_model_are_loaded_for_once_and_end_together() -> None:
    """The end is that of whatever is done last; what nobody takes is left, and everything of nobody has no end."""
    dealt = deal([pile(20, 1.0, load=7.0), pile(10, 2.0, load=7.0), pile(5, None)], (0.0,), own=3)
    assert (dealt.seconds, dealt.rows, dealt.begins) == (7.0 + 20 + 20, (30,), (0.0,))
    other = pile(10, 1.0, load=3.0)
    assert deal([other, pile(20, 1.0, load=7.0), pile(10, 2.0, load=7.0)], (0.0,), own=2).seconds == 3.0 + 10 + 7.0 + 20 + 20
    assert deal([other, pile(5, None), pile(5, None)], (0.0,), own=2).seconds is None
