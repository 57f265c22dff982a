"""How do rows of models that cannot run in packs get their answers? Side by side, left-padded, one forward pass a token.

A micro-batch is as many rows as may run together, longest first. Finished rows leave it. One that runs out of memory is halved
and tried again.

B rows, P tokens of the longest prompt, T positions so far, V vocabulary.
"""

import time
from collections.abc import Callable, Collection, Generator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from ollm_service.core.leasing import RowResult
from workers.runner.answers import NOT_A_NUMBER, Answer, out_of_memory
from workers.runner.batching import MicroBatches
from workers.runner.measurements import Measurements
from workers.runner.memory import is_out_of_memory
from workers.runner.model import LoadedModel, free_memory
from workers.runner.progress import Pulse
from workers.runner.prompts import EncodedRow
from workers.runner.sampling import choice_of, choose_tokens


class PaddedLoop:
    """The rows of one attempt. `started` is told which rows run, each time that a micro-batch begins."""

    def __init__(
        self,
        model: LoadedModel,
        rows: Sequence[EncodedRow],
        *,
        most_rows: int,
        suspects: Collection[int],
        pulse: Pulse,
        measurements: Measurements,
        started: Callable[[tuple[int, ...]], None],
    ) -> None:
        self.model = model
        self._batches = MicroBatches(rows, most_rows=most_rows, suspects=suspects)
        self.pulse = pulse
        self.measurements = measurements
        self._started = started
        self.in_flight: tuple[int, ...] = ()

    def run(self) -> Generator[list[RowResult], None, None]:
        """The results of each micro-batch. Raises StopRequested, and whatever a model raises."""
        while self._batches:
            batch = self._batches.take()
            self.in_flight = tuple(row.row for row in batch)
            self._started(self.in_flight)
            results = self._answer(batch)
            self.in_flight = ()
            yield results

    def _answer(self, batch: Sequence[EncodedRow]) -> list[RowResult]:
        """The micro-batch's results; none when it was too large for the memory and was put back."""
        try:
            results = [answer.result() for answer in self.generate(batch)]
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            results = [] if len(batch) > 1 else [out_of_memory(batch[0])]
        if results:
            self.measurements.count(results)
            return results
        # Outside the except clause, so that the error's frames no longer hold the tensors.
        self.measurements.halvings += 1
        self._batches.halve(batch)
        free_memory()
        return []

    @torch.inference_mode()
    def generate(self, rows: Sequence[EncodedRow]) -> list[Answer]:
        """Answer the rows, which share one way of choosing tokens. Raises StopRequested between steps."""
        model = self.model
        answers = [Answer(row, model.tokenizer, model.end_tokens) for row in rows]
        choice = choice_of(rows[0].generation)
        tokens_BL, mask_BT = left_padded([row.tokens for row in rows], model.pad_token, model.device)
        positions_BL = (mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
        running, cache = answers, DynamicCache(config=model.module.config)
        while True:
            self.pulse()
            began, prompt_tokens = time.monotonic(), int(mask_BT.sum()) if running[0].length == 0 else 0
            logits_BV = model.next_logits(tokens_BL, mask_BT, positions_BL, cache)
            accept(running, logits_BV, choose_tokens(logits_BV, choice, [answer.generator for answer in running]))
            # The tokens were read, so that the device is done.
            self.measurements.count_pass(
                rows=len(running),
                prompt_tokens=prompt_tokens,
                new_tokens=0 if prompt_tokens else len(running),
                seconds=time.monotonic() - began,
            )
            kept = [index for index, answer in enumerate(running) if not answer.is_complete]
            self.pulse.tokens += len(running)
            if not kept:
                return answers
            newest = [running[index].last_token for index in kept]
            if len(kept) < len(running):
                kept_B = torch.tensor(kept, device=model.device)
                cache.reorder_cache(kept_B)  # type: ignore[arg-type]  # any tensor of integers will do
                mask_BT, positions_BL = mask_BT[kept_B], positions_BL[kept_B]
                running = [running[index] for index in kept]
            tokens_BL = torch.tensor(newest, device=model.device).unsqueeze(-1)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones((len(kept), 1))], dim=-1)
            positions_BL = positions_BL[:, -1:] + 1


def left_padded(prompts: Sequence[Sequence[int]], pad_token: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [B, P]: every prompt ends in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    tokens_BP = torch.full((len(prompts), longest), pad_token, dtype=torch.long)
    mask_BP = torch.zeros((len(prompts), longest), dtype=torch.long)
    for index, prompt in enumerate(prompts):
        tokens_BP[index, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask_BP[index, longest - len(prompt) :] = 1
    return tokens_BP.to(device), mask_BP.to(device)


def accept(answers: Sequence[Answer], logits_BV: Tensor, tokens: Sequence[int]) -> None:
    """Give each answer its next token; one whose logits are not numbers fails."""
    is_nan_B = logits_BV.isnan().any(dim=-1).tolist()
    for answer, token, is_nan in zip(answers, tokens, is_nan_B, strict=True):
        if is_nan:
            answer.fail(NOT_A_NUMBER)
        else:
            answer.accept(token)
