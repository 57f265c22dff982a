"""How does a micro-batch become answers where only transformers' own `generate` knows how to feed a model its images?

Every model of that kind goes about positions and features in its own way, and `generate` asks it. Tokens are still chosen here,
row by row: it is shown the choice as if no other token were possible. Rows of equal length and equal shapes run together, so
that nothing is padded.

B rows, L positions of the prompt, T positions so far, V vocabulary.
"""

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from workers.runner.answers import Answer
from workers.runner.measurements import Measurements
from workers.runner.media.feeding import all_of
from workers.runner.padded import PaddedLoop, accept
from workers.runner.progress import Pulse
from workers.runner.prompts import EncodedRow
from workers.runner.sampling import choice_of, choose_tokens


class OwnGenerateLoop(PaddedLoop):
    """The rows of one attempt, a micro-batch at a time."""

    @torch.inference_mode()
    def generate(self, rows: Sequence[EncodedRow]) -> list[Answer]:
        """Answer the rows, which share one way of choosing tokens. Raises StopRequested between steps."""
        answers: list[Answer] = []
        for _, alike in groupby(sorted(rows, key=_company), key=_company):
            answers += self._answer_alike(list(alike))
        return answers

    def _answer_alike(self, rows: Sequence[EncodedRow]) -> list[Answer]:
        model = self.model
        answers = [Answer(row, model.tokenizer, model.end_tokens) for row in rows]
        tokens_BL = torch.tensor([row.tokens for row in rows], device=model.device)
        steps = _Steps(answers, model.pad_token, self.pulse, self.measurements)
        self.pulse()
        model.module.generate(  # type: ignore[operator]  # transformers annotates a module's attribute
            input_ids=tokens_BL,
            attention_mask=torch.ones_like(tokens_BL),
            **all_of(rows, model.module),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
                max_new_tokens=max(row.max_new_tokens for row in rows),
                do_sample=False,
                num_beams=1,
                eos_token_id=None,
                pad_token_id=model.pad_token,
            ),
            logits_processor=LogitsProcessorList([steps]),
            stopping_criteria=StoppingCriteriaList([_UntilComplete(answers)]),
        )
        return answers


def _company(row: EncodedRow) -> Any:
    return (-len(row.tokens), row.media_shapes)


class _Steps(LogitsProcessor):
    """Chooses each row's next token, hands it to its answer, and leaves `generate` no other."""

    def __init__(self, answers: Sequence[Answer], pad_token: int, pulse: Pulse, measurements: Measurements) -> None:
        self._answers = answers
        self._pad_token = pad_token
        self._pulse = pulse
        self._measurements = measurements
        self._began = time.monotonic()
        self._is_first = True

    def __call__(self, tokens_BT: Tensor, scores_BV: Tensor) -> Tensor:
        self._pulse()
        running = [index for index, answer in enumerate(self._answers) if not answer.is_complete]
        logits_BV = scores_BV[torch.tensor(running, device=scores_BV.device)]
        kept = [self._answers[index] for index in running]
        chosen = choose_tokens(logits_BV, choice_of(kept[0].row.generation), [answer.generator for answer in kept])
        accept(kept, logits_BV, chosen)
        now = time.monotonic()
        self._measurements.count_pass(
            rows=len(kept),
            prompt_tokens=tokens_BT.numel() if self._is_first else 0,
            new_tokens=0 if self._is_first else len(kept),
            seconds=now - self._began,
        )
        self._began, self._is_first = now, False
        self._pulse.tokens += len(kept)
        next_B = torch.full((scores_BV.shape[0],), self._pad_token, dtype=torch.long)
        next_B[running] = torch.tensor(chosen)
        return torch.full_like(scores_BV, -torch.inf).scatter(1, next_B.to(scores_BV.device).unsqueeze(1), 0.0)


class _UntilComplete(StoppingCriteria):
    """A row is done when its answer is."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers

    def __call__(self, tokens_BT: Tensor, scores: Any, **_named: Any) -> Any:  # noqa: ARG002 - transformers calls it so
        return torch.tensor([answer.is_complete for answer in self._answers], device=tokens_BT.device)
