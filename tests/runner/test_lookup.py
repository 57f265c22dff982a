"""What is tried in advance, and when does it pay?"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm_service.core.packing import MOST_TRIED_IN_PASS, MOST_TRIED_TOKENS
from workers.runner.packed.guessing import TRY_AGAIN_TOKENS, Guesser, Guesses, PassCosts, Trust
from workers.runner.packed.lookup import SHORTEST_MATCH, Lookup


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=30), st.integers(0, 40))
def test_a_guess_is_what_followed_the_newest_tokens_before(text: list[int], more: list[int], most: int) -> None:
    """It stands in the text behind the same last tokens, and is no longer than was asked for."""
    whole = list(text)
    lookup = Lookup(whole)
    lookup.guess(most)
    whole += more
    guess = lookup.guess(most)
    assert len(guess) <= min(most, MOST_TRIED_TOKENS)
    if guess:
        places = [
            place
            for place in range(SHORTEST_MATCH, len(whole))
            if whole[place - SHORTEST_MATCH : place] == whole[-SHORTEST_MATCH:] and whole[place : place + len(guess)] == guess
        ]
        assert places


def test_the_longest_match_decides_and_the_newest_of_them() -> None:
    """Of two places the one where more of the newest tokens match; of equal ones the later."""
    assert Lookup([1, 2, 3, 4, 9, 2, 3, 4, 8, 1, 2, 3, 4]).guess(1) == [9]
    assert Lookup([7, 2, 3, 5, 6, 7, 2, 3, 6, 0, 2, 3]).guess(2) == [6, 0]
    assert Lookup([1, 2, 3, 4]).guess(4) == []


@pytest.mark.parametrize("count", [1, 3, 16, 63, 64, 65, 256])
def test_no_more_is_tried_than_there_is_room_for(count: int) -> None:
    """Neither in a row nor in a pass, however many rows repeat themselves; where many run nothing is tried."""
    text = [*range(10), *range(10), *range(100, 500), 3, 4, 5, 6]
    rows: list[tuple[Guesser | None, int]] = [(Guesser(text), room % 7) for room in range(count)]
    found = Guesses().of(rows)
    assert all(len(guess) <= room for guess, (_, room) in zip(found, rows, strict=True))
    assert sum(map(len, found)) <= max(0, MOST_TRIED_IN_PASS - count)


def test_a_source_that_was_given_up_is_tried_again_later() -> None:
    """After some tokens more."""
    trust = Trust()
    for _ in range(20):
        trust.learn(tried=4, right=0)
    assert trust.share < 0.01
    trust.give_up()
    pauses = [trust.is_pausing]
    trust.go_on(TRY_AGAIN_TOKENS)
    assert [*pauses, trust.is_pausing] == [True, False]
    assert trust.share > 0.5


def test_trying_pays_where_a_pass_costs_more_than_its_tokens() -> None:
    """Streamed weights: a second a pass and a millisecond a token. In memory with many rows a token costs what it saves."""
    streamed, busy = PassCosts(), PassCosts()
    assert streamed.pays(0.5, rows=1), "nothing is known yet"
    for _ in range(3):
        streamed.note(prompt_tokens=0, rows=1, tokens=1, seconds=1.0)
        streamed.note(prompt_tokens=1000, rows=1, tokens=0, seconds=2.0)
        busy.note(prompt_tokens=0, rows=64, tokens=64, seconds=0.064)
        busy.note(prompt_tokens=1000, rows=0, tokens=0, seconds=1.0)
    assert streamed.pays(0.05, rows=1)
    assert streamed.pays(0.1, rows=32)
    assert not busy.pays(0.5, rows=64)


def test_tokens_that_were_tried_do_not_count_as_the_pass() -> None:
    """A pass that took longer since more was tried in it is no reason to try more."""
    costs = PassCosts()
    costs.note(prompt_tokens=100, rows=0, tokens=0, seconds=1.0)
    costs.note(prompt_tokens=0, rows=1, tokens=16, seconds=0.15 + 0.01)
    saved = costs.seconds_saved(1)
    assert saved is not None
    assert abs(saved - 0.01) < 1e-9
