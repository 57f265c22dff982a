"""Which rows come next, and what do they share?"""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from ollm_service.core.options import GenerationConfig
from workers.runner.packed.waiting import LEAST_SHARED_TOKENS, WaitingRow, WaitingRows, beginning_alike
from workers.runner.prompts import EncodedRow

texts = st.lists(st.integers(0, 2), min_size=1, max_size=3 * LEAST_SHARED_TOKENS).map(tuple)
beginnings = st.lists(st.integers(0, 2), max_size=2 * LEAST_SHARED_TOKENS).map(tuple)


def encoded(row: int, tokens: Sequence[int], max_new_tokens: int = 5) -> EncodedRow:
    """A row of these tokens."""
    return EncodedRow(
        row=row, tokens=tuple(tokens), generation=GenerationConfig(), max_new_tokens=max_new_tokens, is_clamped=False
    )


@given(st.lists(st.tuples(st.sampled_from([(), (1,) * 20, (1,) * 40, (2,) * 20]), texts), max_size=12))
def test_what_rows_share_is_how_each_of_them_begins(parts: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Every row is in one group; a group's beginning is long enough, is each row's, and leaves each a token of its own."""
    rows = [encoded(number, first + rest) for number, (first, rest) in enumerate(parts)]
    groups = beginning_alike(rows)
    assert sorted(waiting.row.row for group in groups for waiting in group) == list(range(len(rows)))
    for group in groups:
        (beginning,) = {waiting.beginning for waiting in group}
        assert (beginning is None) == (len(group) == 1)
        if beginning is not None:
            assert len(beginning.tokens) >= LEAST_SHARED_TOKENS
            assert beginning.rows == len(group)
            assert all(waiting.row.tokens[: len(beginning.tokens)] == beginning.tokens for waiting in group)
            assert all(len(waiting.row.tokens) > len(beginning.tokens) for waiting in group)


def test_a_common_beginning_is_found_whatever_follows() -> None:
    """Rows with one long beginning form one group; a row with another stays out of it."""
    long = tuple(range(100))
    rows = [encoded(number, (*long, 200 + number, *range(number))) for number in range(6)]
    groups = beginning_alike([*rows, encoded(6, range(300, 420))])
    assert sorted(len(group) for group in groups) == [1, 6]
    (shared,) = {waiting.beginning for group in groups for waiting in group if waiting.beginning is not None}
    assert shared.tokens == long


def test_a_longer_beginning_is_not_given_up_for_a_row_more() -> None:
    """Two rows that share 90 tokens keep them, though eight others share the first 20."""
    twins = [encoded(number, (*range(90), 900 + number)) for number in range(2)]
    others = [encoded(2 + number, (*range(20), 500 + number, *range(80))) for number in range(2)]
    groups = beginning_alike([*twins, *others])
    assert sorted((len(group[0].beginning.tokens) if group[0].beginning else 0) for group in groups) == [20, 90]


@given(
    st.lists(st.tuples(texts, st.integers(1, 9)), max_size=15),
    st.integers(1, 5),
    st.integers(1, 60),
    st.sets(st.integers(0, 14)),
)
def test_every_row_comes_once(
    rows: list[tuple[tuple[int, ...], int]], most_rows: int, most_tokens: int, suspects: set[int]
) -> None:
    """At most so many at a time, of so many new tokens unless one alone has more; suspects last and each alone."""
    waiting = WaitingRows([encoded(number, tokens, new) for number, (tokens, new) in enumerate(rows)], suspects)
    came: list[WaitingRow] = []
    while waiting:
        taken = waiting.take(most_rows, most_tokens, others_run=False)
        assert 1 <= len(taken) <= most_rows
        if len(taken) > 1:
            begun = {one.beginning for one in taken if one.beginning is not None}
            own = sum(len(one.row.tokens) - len(one.beginning.tokens if one.beginning else ()) for one in taken)
            assert own + sum(len(beginning.tokens) for beginning in begun) <= most_tokens
        if any(one.row.row in suspects for one in taken):
            assert len(taken) == 1
            assert all(one.row.row in suspects or one in came for one in taken)
        came += taken
    assert sorted(one.row.row for one in came) == list(range(len(rows)))
    of_suspects = [one.row.row in suspects for one in came]
    assert of_suspects == sorted(of_suspects)


def test_long_prompts_join_one_at_a_time_and_suspects_wait_to_be_alone() -> None:
    """A prompt that is longer than a pass should be joins others that run, alone; a suspect waits until nobody runs."""
    waiting = WaitingRows([encoded(0, range(50)), encoded(1, range(60, 110)), encoded(2, range(5))], suspects={2})
    assert [one.row.row for one in waiting.take(4, 20, others_run=False)] == [0]
    assert [one.row.row for one in waiting.take(4, 20, others_run=True)] == [1]
    assert waiting.take(4, 20, others_run=True) == []
    assert [one.row.row for one in waiting.take(4, 20, others_run=False)] == [2]
    assert not waiting


def test_a_beginning_counts_once_in_a_pass() -> None:
    """Ten rows of 102 tokens, of which 100 are common, are 120 tokens: they all come at once."""
    waiting = WaitingRows(encoded(number, (*range(100), 200 + number, 300)) for number in range(10))
    assert len(waiting.take(16, 120, others_run=False)) == 10


def test_rows_that_were_put_back_come_first_again() -> None:
    """In the order in which they had come."""
    waiting = WaitingRows(encoded(number, (number,) * 3, max_new_tokens=9 - number) for number in range(5))
    taken = waiting.take(3, 100, others_run=False)
    waiting.put_back(taken)
    assert [one.row.row for one in waiting.take(5, 100, others_run=False)] == [0, 1, 2, 3, 4]
