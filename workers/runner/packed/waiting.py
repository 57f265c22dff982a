"""Which rows come next, and which of them begin alike?

Rows with the most tokens to answer come first: a row takes as many passes as its answer has tokens, whoever else is there, so
that long ones begun late would run alone at the end. Rows that begin with the same tokens follow each other and share that
beginning, which is computed and kept once. Rows that have crashed a runner come last, each alone, so that they take no other
with them.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence

from workers.runner.packed.pack import TokenSequence
from workers.runner.prompts import EncodedRow

# Fewer tokens are not worth sharing: their part of attention would be computed apart.
LEAST_SHARED_TOKENS = 16


class Beginning:
    """Tokens with which several rows begin. `rows` of them have not ended; `sequence` is set while it is in a cache."""

    def __init__(self, tokens: Sequence[int], rows: int) -> None:
        self.tokens = tokens
        self.rows = rows
        self.sequence: TokenSequence | None = None

    def begun(self) -> TokenSequence:
        """The sequence of these tokens, from now on one and the same."""
        if self.sequence is None:
            self.sequence = TokenSequence(tokens=list(self.tokens), capacity=len(self.tokens))
        return self.sequence


class WaitingRow:
    """A row, and the beginning that it shares with others, if it does."""

    def __init__(self, row: EncodedRow, beginning: Beginning | None = None) -> None:
        self.row = row
        self.beginning = beginning

    def new_tokens(self, beginnings: Collection[Beginning] = ()) -> int:
        """How many of the prompt's tokens a pass would have to compute now that computes these beginnings anyway."""
        if self.beginning is None or (self.beginning.sequence is None and self.beginning not in beginnings):
            return len(self.row.tokens)
        return self.own_tokens

    @property
    def own_tokens(self) -> int:
        """How many of the prompt's tokens are not shared, at least one."""
        return len(self.row.tokens) - (0 if self.beginning is None else len(self.beginning.tokens))

    @property
    def most_own_tokens(self) -> int:
        """With them of the answer all but the last, which is never fed in."""
        return self.own_tokens + self.row.max_new_tokens - 1


class WaitingRows:
    """The rows that have not begun."""

    def __init__(self, rows: Iterable[EncodedRow], suspects: Collection[int] = (), *, may_share: bool = True) -> None:
        found = list(rows)
        others = [row for row in found if row.row not in suspects]
        # The same tokens stand for other images in another row: such rows share nothing.
        alone = [row for row in others if row.media or not may_share]
        together = [[WaitingRow(row)] for row in alone]
        together += beginning_alike(row for row in others if not row.media) if may_share else []
        for group in together:
            group.sort(key=lambda waiting: _order(waiting.row))
        together.sort(key=lambda group: _order(group[0].row))
        self._rows = deque(waiting for group in together for waiting in group)
        self._suspects = deque(WaitingRow(row) for row in found if row.row in suspects)

    def __bool__(self) -> bool:
        return bool(self._rows or self._suspects)

    @property
    def most_tokens(self) -> int:
        """The most that one of them will ever have in a cache, besides a beginning that it shares."""
        return max((waiting.most_own_tokens for waiting in (*self._rows, *self._suspects)), default=0)

    def beginning_tokens(self, rows: int) -> int:
        """What beginnings take of a cache while at most so many rows run: no more of them are there than rows, but one or two."""
        lengths = {waiting.beginning: len(waiting.beginning.tokens) for waiting in self._rows if waiting.beginning is not None}
        return sum(sorted(lengths.values(), reverse=True)[: rows + 1])

    def take(self, most_rows: int, most_tokens: int, *, others_run: bool) -> list[WaitingRow]:
        """The next rows, of at most so many new prompt tokens, or one alone that has more.

        Such a one joins others that run: if it waited for them, long prompts would be answered one after another.
        """
        if not self._rows and self._suspects and not others_run:
            return [self._suspects.popleft()]
        taken: list[WaitingRow] = []
        beginnings: set[Beginning] = set()
        tokens = 0
        while self._rows and len(taken) < most_rows:
            waiting = self._rows[0]
            tokens += waiting.new_tokens(beginnings)
            if tokens > most_tokens and taken:
                break
            taken.append(self._rows.popleft())
            if waiting.beginning is not None:
                beginnings.add(waiting.beginning)
        return taken

    def put_back(self, rows: Iterable[WaitingRow]) -> None:
        """Have these rows come next, in this order."""
        self._rows.extendleft(reversed(list(rows)))


def _order(row: EncodedRow) -> tuple[bool, int, int, int]:
    """Rows with images or sounds first, so that the first pass shows what becomes of them; then those with most to answer."""
    return (not row.media, -row.max_new_tokens, -len(row.tokens), row.row)


def beginning_alike(rows: Iterable[EncodedRow]) -> list[list[WaitingRow]]:
    """The rows in groups that share a beginning; a row that shares none is a group of its own.

    Among rows in the order of their tokens, neighbours are most alike. A group takes in its next neighbour as long as that
    makes the tokens that need not be computed more, or leaves them as many. Every row keeps a token of its own.
    """
    ordered = sorted(rows, key=lambda row: row.tokens)
    groups: list[list[EncodedRow]] = []
    shared = 0
    for row in ordered:
        if groups:
            common = _common(groups[-1][-1].tokens, row.tokens)
            size = len(groups[-1])
            together = common if size == 1 else min(shared, common)
            if together >= LEAST_SHARED_TOKENS and together * size >= shared * (size - 1):
                groups[-1].append(row)
                shared = together
                continue
        groups.append([row])
        shared = 0
    return [_group(group) for group in groups]


def _group(rows: Sequence[EncodedRow]) -> list[WaitingRow]:
    if len(rows) == 1:
        return [WaitingRow(rows[0])]
    # The first and the last of ordered rows are the least alike.
    tokens = rows[0].tokens[: _common(rows[0].tokens, rows[-1].tokens)]
    beginning = Beginning(tokens, rows=len(rows))
    return [WaitingRow(row, beginning) for row in rows]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin, at least one of each left over."""
    most = min(len(one), len(other)) - 1
    return next((place for place in range(most) if one[place] != other[place]), most)
