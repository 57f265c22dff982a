"""In what order do workers take plans, and when is the last one done?

Every worker takes the next plan as soon as it is free, whoever else might be faster: of those that wait, the first that it can
run. It loads a model whenever it goes over to plans of another kind.
"""

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Pile:
    """Plans of one kind: `rows` in plans of at most `plan_rows`.

    For each worker the seconds that a row takes it, None where it takes none of them, and those of loading the model.
    """

    rows: int
    plan_rows: int
    row_seconds: tuple[float | None, ...]
    load_seconds: tuple[float, ...]

    def without(self, workers: Collection[int]) -> "Pile":
        """The same pile, of which these workers take nothing."""
        kept = tuple(None if number in workers else seconds for number, seconds in enumerate(self.row_seconds))
        return replace(self, row_seconds=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealt:
    """What became of the last piles: the seconds until all that anybody takes of them is done, None where nobody takes any.

    For each worker its rows, and the seconds until it begins with them, None where it takes none.
    """

    seconds: float | None
    rows: tuple[int, ...]
    begins: tuple[float | None, ...]


def deal(piles: Sequence[Pile], busy: Sequence[float], *, own: int = 1) -> Dealt:
    """Deal the piles out, each worker taking from the first of which it takes any. `busy` are the seconds until each is free.

    The last `own` piles are asked for; they are of one model, so that going from one to another loads nothing.
    """
    first, left = len(piles) - own, [pile.rows for pile in piles]
    rows, end = [0] * len(busy), 0.0
    begins: list[float | None] = [None] * len(busy)
    loaded: list[int | None] = [None] * len(busy)
    next_pile = [0] * len(busy)  # those before it are used up, or nothing for this worker
    free = [(at, piles[first].load_seconds[number], number) for number, at in enumerate(busy)]
    heapq.heapify(free)
    while free and any(left[first:]):
        at, tie, number = heapq.heappop(free)
        place = next_pile[number]
        while place < len(piles) and (left[place] == 0 or piles[place].row_seconds[number] is None):
            place += 1
        next_pile[number] = place
        if place == len(piles):
            continue  # nothing is left for this worker
        pile, taken, is_own = piles[place], min(piles[place].plan_rows, left[place]), place >= first
        left[place] -= taken
        if is_own and begins[number] is None:
            begins[number] = at
        if loaded[number] != min(place, first):
            at, loaded[number] = at + pile.load_seconds[number], min(place, first)
        at += taken * (pile.row_seconds[number] or 0.0)
        if is_own:
            rows[number], end = rows[number] + taken, max(end, at)
        heapq.heappush(free, (at, tie, number))
    return Dealt(seconds=end if any(rows) else None, rows=tuple(rows), begins=tuple(begins))
