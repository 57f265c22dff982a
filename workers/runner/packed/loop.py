"""How does a plan's work get done in packs? One pass after another, which rows join and leave.

Each pass has the newest token of every row that runs, with those that are tried in advance, and the whole prompts of rows that
join. After it a row that has its answer makes room for the next. A pass that runs out of memory is given up: its rows begin
anew, at most half as many at a time.

M tokens whose logits are wanted, V vocabulary.
"""

import time
from collections.abc import Callable, Collection, Generator, Sequence

import torch
from torch import Tensor

from ollm_service.core.leasing import RowResult
from ollm_service.core.packing import MOST_PACK_TOKENS
from workers.runner.answers import NOT_A_NUMBER, Answer, out_of_memory
from workers.runner.kv.cache import PackCache
from workers.runner.measurements import Measurements
from workers.runner.media.feeding import features_of, one_at_a_time, placeholder_of
from workers.runner.memory import is_out_of_memory
from workers.runner.model import LoadedModel, free_memory
from workers.runner.packed.attachment import PackedModel
from workers.runner.packed.draft import DraftModel
from workers.runner.packed.guessing import Guesser, Guesses
from workers.runner.packed.pack import Pack, Segment, TokenSequence
from workers.runner.packed.waiting import WaitingRow, WaitingRows
from workers.runner.progress import Pulse
from workers.runner.prompts import EncodedRow
from workers.runner.sampling import Choice, choice_of, choose_tokens


class RunningRow:
    """A row that has begun: its answer so far, its tokens, and guesses of the next."""

    def __init__(self, waiting: WaitingRow, answer: Answer, sequence: TokenSequence, guesser: Guesser | None) -> None:
        self.waiting = waiting
        self.answer = answer
        self.sequence = sequence
        self.guesser = guesser

    @property
    def has_begun(self) -> bool:
        """Whether its prompt was computed."""
        return self.sequence.cached > 0

    @property
    def room(self) -> int:
        """How many tokens may be tried: one that would be the answer's last need not be fed in."""
        return self.answer.row.max_new_tokens - self.answer.length - 1

    def poses_as(self, placeholder: int) -> bool:
        """Whether it would feed in this token though it has nothing to be put in the token's place."""
        if self.has_begun:
            return placeholder in self.sequence.tokens[self.sequence.cached :]
        return not self.answer.row.media and placeholder in self.answer.row.tokens

    def accept(self, segment: Segment, chosen: Sequence[int], are_numbers: Sequence[bool]) -> int:
        """Take the tokens that the model chose after each of the wanted places, as far as those before them were right.

        Returns how many. The sequence then ends with the newest of them, which alone is not in the cache.
        """
        tried = self.sequence.tokens[len(self.sequence.tokens) - segment.wanted + 1 :]
        taken: list[int] = []
        for token, is_number in zip(chosen, are_numbers, strict=True):
            if not is_number:
                self.answer.fail(NOT_A_NUMBER)
                break
            self.answer.accept(token)
            taken.append(token)
            if self.answer.is_complete or len(taken) > len(tried) or tried[len(taken) - 1] != token:
                break
        del self.sequence.tokens[len(self.sequence.tokens) - len(tried) :]
        self.sequence.cached = len(self.sequence.tokens) + max(0, len(taken) - 1)
        self.sequence.tokens += taken
        if self.guesser is not None:
            self.guesser.learn(taken, len(tried), max(0, len(taken) - 1))
        return len(taken)


class PackedLoop:
    """The rows of one attempt. `started` is told which rows run, each time that some have joined.

    Without `tries_ahead` every row gets one token a pass: the answers are the same, and what guesses gain can be measured.
    The `clock` tells whether they pay.
    """

    def __init__(  # noqa: PLR0913 - what a loop is given, and two options of this one
        self,
        model: LoadedModel,
        rows: Sequence[EncodedRow],
        *,
        most_rows: int,
        suspects: Collection[int],
        pulse: Pulse,
        measurements: Measurements,
        started: Callable[[tuple[int, ...]], None],
        planned_tokens: int | None = None,
        tries_ahead: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._rows = rows
        self._most_rows = max(1, most_rows)
        self._planned_tokens = self._most_rows * planned_tokens if planned_tokens else None
        self._suspects = suspects
        self._pulse = pulse
        self._measurements = measurements
        self._started = started
        self._packed = PackedModel(model.module, model.device, visit=pulse)
        vocabulary = model.module.config.get_text_config(decoder=True).vocab_size
        self._clock = clock
        draft = None if model.draft is None else DraftModel(model.draft, model.device, visit=pulse)
        self._guesses = Guesses(draft, vocabulary, clock)
        self._tries_ahead, self._is_trying = tries_ahead, False
        self._waiting = WaitingRows(())
        self._running: list[RunningRow] = []

    @property
    def in_flight(self) -> tuple[int, ...]:
        """The rows that run."""
        return tuple(running.answer.row.row for running in self._running)

    def run(self) -> Generator[list[RowResult], None, None]:
        """After each pass the rows that ended with it, often none. Raises StopRequested, PassFailed, and what a model raises."""
        tokens = max((len(row.tokens) + row.max_new_tokens for row in self._rows), default=0)
        rows = min(self._most_rows, len(self._rows))
        attached, alone = self._packed.attached(self._model.layers()), one_at_a_time(self._model.module)
        with self._model.open_cache(rows=rows, tokens=tokens) as cache, attached, alone, self._guesses.ready():
            self._waiting = WaitingRows(self._rows, self._suspects, may_share=cache.keeps_all)
            self._expect(cache, rows)
            while self._waiting or self._running:
                self._admit(cache)
                yield self._pass(cache)

    def _admit(self, cache: PackCache) -> None:
        if not all(row.has_begun for row in self._running):
            return  # one that was held back joins first: more prompts beside its own would be too many tokens
        taken = self._waiting.take(self._most_rows - len(self._running), MOST_PACK_TOKENS, others_run=bool(self._running))
        if taken:
            if taken[0].row.row in self._suspects:
                cache.expect(0, 0)  # it is alone, and has all memory for itself
            # In the order of their lengths, in which they get their places in the cache: what is alike is beside each other.
            taken.sort(key=lambda waiting: waiting.own_tokens)
            self._running += [self._begun(waiting, may_try=self._tries_ahead and cache.can_go_back) for waiting in taken]
            self._started(self.in_flight)

    def _begun(self, waiting: WaitingRow, *, may_try: bool) -> RunningRow:
        row, beginning = waiting.row, waiting.beginning
        parent = None if beginning is None else beginning.begun()
        own = list(row.tokens[-waiting.own_tokens :])
        spans = () if row.media is None else row.media.spans
        sequence = TokenSequence(tokens=own, capacity=waiting.most_own_tokens, parent=parent, spans=spans)
        guesser = Guesser(row.tokens) if may_try and row.generation.is_greedy else None
        return RunningRow(waiting, Answer(row, self._model.tokenizer, self._model.end_tokens), sequence, guesser)

    def _pass(self, cache: PackCache) -> list[RowResult]:
        """One pass; the results of rows that ended with it."""
        self._pulse()
        try:
            self._step(cache)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            is_over = False
        else:
            is_over = True
        # Outside the except clause, so that the error's frames no longer hold the tensors.
        return self._let_go(cache) if is_over else self._shrink(cache)

    @torch.inference_mode()
    def _step(self, cache: PackCache) -> None:
        """One forward pass, and the tokens that it gives."""
        began, pack = self._clock(), Pack()
        pairs = self._fill(pack)
        filled = self._clock()
        joining = [row.answer.row for row, segment in pairs if segment.is_prompt]
        logits_MV = self._packed.logits(pack, cache, features_of(joining, self._model.module))
        tokens, are_numbers = self._choose(logits_MV, pairs)
        del logits_MV
        for segment in pack.segments:
            segment.sequence.cached = len(segment.sequence.tokens)
        place = step_tokens = 0
        for row, segment in pairs:
            end = place + segment.wanted
            accepted = row.accept(segment, tokens[place:end], are_numbers[place:end])
            if accepted < segment.wanted and not row.answer.is_complete:
                cache.truncate(row.sequence)
            self._pulse.tokens += accepted
            step_tokens += 0 if segment.is_prompt else accepted
            place = end
        self._count(pack, pairs, step_tokens, self._clock() - began, filled - began)

    def _fill(self, pack: Pack) -> list[tuple[RunningRow, Segment]]:
        """Put into the pack what is to be computed; the rows, and where each is.

        Where images or sounds come in, a row that has their placeholder in its text waits for the next pass, or they would be
        put into it.
        """
        pairs: list[tuple[RunningRow, Segment]] = []
        feeds = any(row.answer.row.media and not row.has_begun for row in self._running)
        placeholder = placeholder_of(self._model.module) if feeds else None
        running = [row for row in self._running if placeholder is None or not row.poses_as(placeholder)]
        steps = [row for row in running if row.has_begun]
        self._is_trying = any(row.guesser is not None for row in steps)
        guesses = self._guesses.of([(row.guesser, row.room) for row in steps])
        for row, guessed in zip(steps, guesses, strict=True):
            tried = guessed[: guessed.index(placeholder)] if placeholder in guessed else guessed
            row.sequence.tokens += tried
            pairs.append((row, pack.add(row.sequence, wanted=1 + len(tried), is_prompt=False)))
        for row in running:
            if not row.has_begun:
                parent = row.sequence.parent
                if parent is not None and not parent.cached and not pack.has(parent):
                    pack.add(parent, wanted=0, is_prompt=True)
                pairs.append((row, pack.add(row.sequence, wanted=1, is_prompt=True)))
        return pairs

    def _choose(self, logits_MV: Tensor, pairs: Sequence[tuple[RunningRow, Segment]]) -> tuple[list[int], list[bool]]:
        """The token that follows each wanted place, and whether its logits were numbers."""
        largest_M, best_M = logits_MV.max(dim=-1)  # of which nothing is a number the largest is none
        tokens: list[int] = best_M.tolist()
        drawn: dict[Choice, list[tuple[int, RunningRow]]] = {}
        place = 0
        for row, segment in pairs:
            if not row.answer.row.generation.is_greedy:
                drawn.setdefault(choice_of(row.answer.row.generation), []).append((place, row))
            place += segment.wanted
        for choice, rows in drawn.items():
            places = torch.tensor([place for place, _ in rows], device=logits_MV.device)
            chosen = choose_tokens(logits_MV[places], choice, [row.answer.generator for _, row in rows])
            for (place, _), token in zip(rows, chosen, strict=True):
                tokens[place] = token
        return tokens, (~largest_M.isnan()).tolist()

    def _count(
        self, pack: Pack, pairs: Sequence[tuple[RunningRow, Segment]], step_tokens: int, seconds: float, guess_seconds: float
    ) -> None:
        """Count a pass. What guessing took of its seconds, as by a draft, is no cost of the tokens in it."""
        steps = [segment for _, segment in pairs if not segment.is_prompt]
        computed = sum(segment.length for segment in pack.segments if segment.is_prompt)
        given = sum(len(row.answer.row.tokens) for row, segment in pairs if segment.is_prompt)
        self._measurements.count_pass(
            prompt_tokens=given,
            shared_tokens=given - computed,
            rows=len(pairs),
            new_tokens=step_tokens,
            tried_tokens=sum(segment.wanted - 1 for segment in steps),
            seconds=seconds,
        )
        tokens = sum(segment.length for segment in steps)
        self._guesses.costs.note(prompt_tokens=computed, rows=len(steps), tokens=tokens, seconds=seconds - guess_seconds)

    def _let_go(self, cache: PackCache) -> list[RowResult]:
        """Make room where rows have their answer."""
        ended = [row for row in self._running if row.answer.is_complete]
        self._running = [row for row in self._running if not row.answer.is_complete]
        for row in ended:
            self._forget(row, cache)
        results = [row.answer.result() for row in ended]
        self._measurements.count(results)
        return results

    def _forget(self, row: RunningRow, cache: PackCache) -> None:
        cache.forget(row.sequence)
        self._guesses.forget(row.guesser)
        beginning = row.waiting.beginning
        if beginning is not None:
            beginning.rows -= 1
            if not beginning.rows and beginning.sequence is not None:
                cache.forget(beginning.sequence)

    def _shrink(self, cache: PackCache) -> list[RowResult]:
        """Memory ran out: begin these rows anew, fewer at a time, and from now on without trying tokens in advance.

        One that was alone, and not for tokens that were tried, gets that as its error.
        """
        stopped, self._running = self._running, []
        for row in stopped:
            cache.forget(row.sequence)
            self._guesses.forget(row.guesser)
            beginning = row.waiting.beginning
            if beginning is not None and beginning.sequence is not None:
                cache.forget(beginning.sequence)
                beginning.sequence = None
        is_alone = len(stopped) == 1 and not self._is_trying
        if is_alone and not cache.has_slots:
            free_memory()
            self._forget(stopped[0], cache)
            return [out_of_memory(stopped[0].answer.row)]
        self._measurements.halvings += 1
        self._tries_ahead = False
        self._waiting.put_back(row.waiting for row in stopped)
        if is_alone:
            cache.expect(0, 0)  # what was there for others may be all that it lacked
        else:
            self._most_rows = max(1, len(stopped) // 2)
            self._expect(cache, self._most_rows)
        free_memory()
        return []

    def _expect(self, cache: PackCache, rows: int) -> None:
        """Have slots for so many rows, if they and the beginnings that rows share take no more than was planned for."""
        own, beginnings = self._waiting.most_tokens, self._waiting.beginning_tokens(rows)
        planned = self._planned_tokens
        fits = planned is None or rows * own + beginnings <= planned
        cache.expect(rows if fits else 0, own)
