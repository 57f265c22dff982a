"""Which tokens may come next in a row, told from the row itself, and does it pay to try them?

Where weights stream from disk, or a pass over few rows waits for memory, a pass over some more tokens costs little more. What a
row has said before it often says again: names, numbers, sentences of its prompt. So what followed the newest tokens when they
were there last is tried; the pass tells for each whether it is what the model would have chosen. Those that are right count as
generated, the first wrong one and what is behind it is forgotten. The tokens are those of one at a time.
"""

from collections.abc import Sequence

from ollm_service.core.packing import MOST_TRIED_TOKENS

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
# How much a trial says about the next, and what is expected of a row's first.
NEWEST_WEIGHT, FIRST_SHARE = 0.3, 0.6
# After so many tokens a row that had given up tries again.
TRY_AGAIN_TOKENS = 48


class Lookup:
    """One row's guesses. `text` are its tokens so far, the prompt's too."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._share = FIRST_SHARE
        self._pause = 0
        self.extend(text)

    @property
    def share(self) -> float:
        """Which part of the tokens tried is expected to be right."""
        return self._share

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in tokens that are certain."""
        for token in tokens:
            # What ends at the newest token is noted when the next one is there: it has to be followed by something.
            end = len(self._text)
            for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self._ends[tuple(self._text[end - length : end])] = end
            self._text.append(token)
        self._pause = max(0, self._pause - len(tokens))

    def guess(self, most: int) -> list[int]:
        """At most so many tokens that may follow."""
        most = min(most, MOST_TRIED_TOKENS)
        for length in range(min(LONGEST_MATCH, len(self._text)), SHORTEST_MATCH - 1, -1):
            end = self._ends.get(tuple(self._text[-length:]))
            if end is not None:
                return self._text[end : end + most]
        return []

    def learn(self, tried: int, right: int) -> None:
        """So many of those tried were right."""
        self._share += NEWEST_WEIGHT * (right / tried - self._share)

    def give_up(self) -> None:
        """It does not pay at present."""
        self._pause = TRY_AGAIN_TOKENS
        self._share = FIRST_SHARE

    @property
    def is_pausing(self) -> bool:
        """Whether it did not pay a short while ago."""
        return self._pause > 0


class PassCosts:
    """What passes have cost: seconds of one over so many rows, and of each token more in one."""

    def __init__(self) -> None:
        self._pass_seconds: float | None = None
        self._token_seconds: float | None = None

    def note(self, *, prompt_tokens: int, rows: int, tokens: int, seconds: float) -> None:
        """A pass: over prompts, over one token each of `rows` rows, or over `tokens` of theirs with those tried."""
        if prompt_tokens:
            # Nearly all of a prompt's pass is its tokens; where weights stream, what of it the disk took is not.
            spent = max(0.0, seconds - (self._pass_seconds or 0.0)) / prompt_tokens
            self._token_seconds = spent if self._token_seconds is None else min(spent, self._token_seconds)
        elif rows:
            alone = max(0.0, seconds - (tokens - rows) * (self._token_seconds or 0.0))
            known = self._pass_seconds
            self._pass_seconds = alone if known is None else known + NEWEST_WEIGHT * (alone - known)

    def seconds_saved(self, rows: int) -> float | None:
        """What one right token saves among so many rows; None before a pass was seen."""
        return None if self._pass_seconds is None else self._pass_seconds / rows

    def pays(self, share: float, rows: int) -> bool:
        """Whether trying a token that is right with this probability takes less than what it saves."""
        saved = self.seconds_saved(rows)
        return saved is None or share * saved > (self._token_seconds or 0.0)
