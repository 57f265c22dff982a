"""Which few combinations have every pair in them? All-pairs testing: most faults need one value, or two together, to show."""

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import TypeVar

C = TypeVar("C", bound=tuple[Hashable, ...])

Pair = tuple[tuple[int, Hashable], tuple[int, Hashable]]


def pairs_of(combination: Sequence[Hashable]) -> frozenset[Pair]:
    """Every two of the combination's values, each with the number of its axis."""
    return frozenset(combinations(enumerate(combination), 2))


def pairwise_cover(combinations_: Sequence[C]) -> list[C]:
    """Some of the combinations, in their order, that hold every pair that any of them holds.

    Greedy: whichever holds most pairs that none has held so far is taken next, the first of equals, so that the same combinations
    always give the same cover. One combination may not be left out for another: what is not listed cannot be taken.
    """
    held = {combination: pairs_of(combination) for combination in combinations_}
    wanted: set[Pair] = set().union(*held.values())
    taken: set[C] = set()
    while wanted:
        best = max(held, key=lambda combination: len(held[combination] & wanted))
        taken.add(best)
        wanted -= held[best]
    return [combination for combination in held if combination in taken]
