"""Which tokens are tried in advance, and does it pay?

Where weights stream from disk, or a pass over few rows waits for memory, a pass over some more tokens costs little more. So
tokens that may come next travel behind a row's newest one; the pass tells for each whether it is what the model would have
chosen. Those that are right count as generated, the first wrong one and what is behind it is forgotten. The tokens are those of
one at a time.

A row's own text is asked first, then a draft model where there is one.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile

from ollm_service.core.packing import MOST_DRAFTED_ROWS, MOST_TRIED_IN_PASS, USUAL_GUESS_TOKENS
from workers.runner.packed.draft import DraftModel
from workers.runner.packed.lookup import SHORTEST_MATCH, Lookup

# How much a trial says about the next, and what is expected of a row's first.
NEWEST_WEIGHT, FIRST_SHARE = 0.3, 0.6
# A prompt of fewer tokens says little of what one costs; of a row whose text was right so often one token that matches is enough.
TELLING_TOKENS, SURE_SHARE = 64, 0.75
# After so many tokens a source that was given up is tried again.
TRY_AGAIN_TOKENS = 48


class Trust:
    """How often one source's guesses were right for one row."""

    def __init__(self) -> None:
        self.share = FIRST_SHARE
        self._pause = 0

    @property
    def is_pausing(self) -> bool:
        """Whether it did not pay a short while ago."""
        return self._pause > 0

    def learn(self, tried: int, right: int) -> None:
        """So many of those tried were right."""
        self.share += NEWEST_WEIGHT * (right / tried - self.share)

    def give_up(self) -> None:
        """It does not pay at present."""
        self._pause = TRY_AGAIN_TOKENS
        self.share = FIRST_SHARE

    def go_on(self, tokens: int) -> None:
        """The row has so many tokens more."""
        self._pause = max(0, self._pause - tokens)


class Guesser:
    """What is guessed for one row: its text so far, and how much either source is to be trusted."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text = list(text)
        self.lookup = Lookup(self.text)
        self.of_text, self.of_draft = Trust(), Trust()
        self._asked: Trust | None = None

    def ask(self, source: Trust, guess: list[int]) -> list[int]:
        """Remember whose guess this is."""
        self._asked = source if guess else self._asked
        return guess

    def learn(self, tokens: Sequence[int], tried: int, right: int) -> None:
        """These tokens are certain now; so many were tried for them."""
        self.text += tokens
        for trust in (self.of_text, self.of_draft):
            trust.go_on(len(tokens))
        if tried and self._asked is not None:
            self._asked.learn(tried, right)
        self._asked = None


class Guesses:
    """What is tried in the passes of one attempt."""

    def __init__(self, draft: DraftModel | None = None, vocabulary: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """A draft may guess tokens below `vocabulary`, those that the model has a place for."""
        self.costs = PassCosts()
        self.draft = draft if draft is not None and draft.can_guess else None
        self._vocabulary = vocabulary
        self._draft_seconds = 0.0
        self._clock = clock

    def of(self, rows: Sequence[tuple[Guesser | None, int]]) -> list[list[int]]:
        """Guesses for each of the rows that have begun, None where none are wanted, which may still get so many tokens."""
        spare = max(0, MOST_TRIED_IN_PASS - len(rows))
        found: list[list[int]] = []
        for left, (guesser, room) in zip(range(len(rows), 0, -1), rows, strict=True):
            guess: list[int] = []
            if guesser is not None and self._pays(guesser.of_text, len(rows), 0.0):
                shortest = 1 if guesser.of_text.share >= SURE_SHARE else SHORTEST_MATCH
                guess = guesser.ask(guesser.of_text, guesser.lookup.guess(min(spare // left, room), shortest))
            spare -= len(guess)
            found.append(guess)
        if self.draft is not None:
            self._ask_draft(rows, found, spare)
        return found

    def _ask_draft(self, rows: Sequence[tuple[Guesser | None, int]], found: list[list[int]], spare: int) -> None:
        draft = self.draft
        assert draft is not None
        without = [
            (number, guesser)
            for number, (guesser, room) in enumerate(rows)
            if guesser is not None and not found[number] and room and self._pays(guesser.of_draft, len(rows), self._draft_seconds)
            if draft.can_read(guesser.text)
        ]
        most = min(USUAL_GUESS_TOKENS, spare // len(without) if without else 0)
        if most < 1 or len(rows) > MOST_DRAFTED_ROWS:
            return
        has_read = all(draft.knows(guesser) for _, guesser in without)
        began = self._clock()
        guesses = draft.guess({guesser: guesser.text for _, guesser in without}, most)
        if has_read:  # a prompt is read once, which says nothing of what a guess costs
            spent = (self._clock() - began) / (most * len(without))
            self._draft_seconds += NEWEST_WEIGHT * (spent - self._draft_seconds) if self._draft_seconds else spent
        for number, guesser in without:
            known = takewhile(lambda token: token < self._vocabulary, guesses[guesser][: rows[number][1]])
            found[number] = guesser.ask(guesser.of_draft, list(known))

    def _pays(self, trust: Trust, rows: int, seconds: float) -> bool:
        if trust.is_pausing:
            return False
        if self.costs.pays(trust.share, rows, seconds):
            return True
        trust.give_up()
        return False

    def ready(self) -> AbstractContextManager[None]:
        """Guesses can be asked for as long as this lasts."""
        return nullcontext() if self.draft is None else self.draft.attached()

    def forget(self, guesser: Guesser | None) -> None:
        """This row ends."""
        if self.draft is not None and guesser is not None:
            self.draft.forget(guesser)


class PassCosts:
    """What passes have cost: seconds of one over so many rows, and of each token more in one."""

    def __init__(self) -> None:
        self._pass_seconds: float | None = None
        self._token_seconds: float | None = None

    def note(self, *, prompt_tokens: int, rows: int, tokens: int, seconds: float) -> None:
        """A pass: over prompts, over one token each of `rows` rows, or over `tokens` of theirs with those tried."""
        tried = tokens - rows
        if prompt_tokens:
            # Nearly all of a long prompt's pass is its tokens; where weights stream, what of it the disk took is not.
            spent = max(0.0, seconds - (self._pass_seconds or 0.0)) / prompt_tokens
            if prompt_tokens >= TELLING_TOKENS:
                self._token_seconds = spent if self._token_seconds is None else min(spent, self._token_seconds)
        elif rows and tried and self._pass_seconds is not None:
            spent = max(0.0, seconds - self._pass_seconds) / tried
            self._token_seconds = spent if self._token_seconds is None else _towards(self._token_seconds, spent)
        elif rows:
            alone = max(0.0, seconds - tried * (self._token_seconds or 0.0))
            self._pass_seconds = alone if self._pass_seconds is None else _towards(self._pass_seconds, alone)

    def seconds_saved(self, rows: int) -> float | None:
        """What one right token saves among so many rows; None before a pass was seen."""
        return None if self._pass_seconds is None else self._pass_seconds / rows

    def pays(self, share: float, rows: int, guess_seconds: float = 0.0) -> bool:
        """Whether guessing and trying a token that is right with this probability takes less than what it saves."""
        saved = self.seconds_saved(rows)
        return saved is None or share * saved > (self._token_seconds or 0.0) + guess_seconds


def _towards(known: float, seen: float) -> float:
    return known + NEWEST_WEIGHT * (seen - known)
