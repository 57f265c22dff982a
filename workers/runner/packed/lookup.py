"""Which tokens may come next in a row, told from the row itself?

What a row has said before it often says again: names, numbers, sentences of its prompt. So what followed the newest tokens when
they were there last is guessed. The text is searched each time: an index would take a hundred times its memory.
"""

from array import array
from collections.abc import Sequence

import numpy

from ollm_service.core.packing import MOST_TRIED_TOKENS

LONGEST_MATCH, SHORTEST_MATCH = 4, 2


class Lookup:
    """One row's guesses. `text` are its tokens so far, the prompt's too; whoever has it adds to it."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text
        self._searched = array("i")

    def guess(self, most: int, shortest: int = SHORTEST_MATCH) -> list[int]:
        """At most so many tokens that may follow, where the newest `shortest` or more were there before: most of them, latest."""
        most = min(most, MOST_TRIED_TOKENS)
        if most < 1 or not self._text:
            return []
        self._searched.extend(self._text[len(self._searched) :])
        tokens = numpy.frombuffer(self._searched, dtype=numpy.int32)
        found: list[int] = []
        ends = numpy.flatnonzero(tokens[:-1] == tokens[-1]) + 1  # each is followed by something
        for length in range(1, LONGEST_MATCH + 1):
            ends = ends[ends >= length]
            ends = ends[tokens[ends - length] == tokens[-length]] if len(ends) else ends
            if not len(ends):
                break
            if length >= shortest:
                found = tokens[ends[-1] : ends[-1] + most].tolist()
        return found
