"""Which rows run together? Rows that choose tokens in the same way, longest first, at most so many at a time."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from workers.runner.prompts import EncodedRow
from workers.runner.sampling import Choice, choice_of


class MicroBatches:
    """The rows still to run, handed out as micro-batches.

    Longest first: what does not fit shows at once, and the first micro-batch is the one in which a pass has most to do. Equal
    lengths lie together, so that little is padding. Rows with images or sounds come before all others, each with rows of equal
    shapes alone. Suspects, rows that have crashed a runner, come last and each alone, so that they take no other row with them.
    """

    def __init__(self, rows: Iterable[EncodedRow], most_rows: int, suspects: Collection[int] = ()) -> None:
        ordered = sorted(rows, key=lambda row: (not row.media, -len(row.tokens), -row.max_new_tokens, row.row))
        groups: dict[tuple[Choice, tuple[Any, ...]], list[EncodedRow]] = {}
        for row in ordered:
            if row.row not in suspects:
                groups.setdefault((choice_of(row.generation), row.media_shapes), []).append(row)
        # A dict keeps the order of insertion: the group with the longest row comes first.
        self._groups = [*groups.values(), *([row] for row in ordered if row.row in suspects)]
        self.most_rows = max(1, most_rows)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self) -> Sequence[EncodedRow]:
        """The next micro-batch. Raises IndexError when none is left."""
        group = self._groups[0]
        batch, rest = group[: self.most_rows], group[self.most_rows :]
        if rest:
            self._groups[0] = rest
        else:
            del self._groups[0]
        return batch

    def halve(self, batch: Sequence[EncodedRow]) -> None:
        """Put back a micro-batch that was too large; from now on they are at most half of it."""
        self.most_rows = max(1, len(batch) // 2)
        self._groups.insert(0, list(batch))
