"""Which tokens may come next in a row, told from the row itself?

What a row has said before it often says again: names, numbers, sentences of its prompt. So what followed the newest tokens when
they were there last is guessed.
"""

from collections.abc import Sequence

from ollm_service.core.packing import MOST_TRIED_TOKENS

LONGEST_MATCH, SHORTEST_MATCH = 4, 2


class Lookup:
    """One row's guesses. `text` are its tokens so far, the prompt's too; whoever has it adds to it.

    An index of what stood where is made when a guess is wanted for the first time: it takes far more memory than the text.
    """

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text
        self._ends: dict[tuple[int, ...], int] = {}
        self._noted = 0

    def _note_ends(self) -> None:
        """What ends at the newest token is noted when the next one is there: it has to be followed by something."""
        for end in range(self._noted, len(self._text)):
            for length in range(1, min(LONGEST_MATCH, end) + 1):
                self._ends[tuple(self._text[end - length : end])] = end
        self._noted = len(self._text)

    def guess(self, most: int, shortest: int = SHORTEST_MATCH) -> list[int]:
        """At most so many tokens that may follow, where the newest `shortest` or more were there before."""
        most = min(most, MOST_TRIED_TOKENS)
        if most < 1:
            return []
        self._note_ends()
        for length in range(min(LONGEST_MATCH, len(self._text)), shortest - 1, -1):
            end = self._ends.get(tuple(self._text[-length:]))
            if end is not None:
                return list(self._text[end : end + most])
        return []
