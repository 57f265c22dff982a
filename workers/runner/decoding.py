"""How does a micro-batch of rows become answers? Left-padded, one forward pass a token, finished rows leave the batch.

B rows, P tokens of the longest prompt, T positions so far, V vocabulary.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workers.runner.answers import Answer
from workers.runner.batching import choice_of
from workers.runner.measurements import Measurements
from workers.runner.model import LoadedModel
from workers.runner.progress import Pulse
from workers.runner.prompts import EncodedRow
from workers.runner.sampling import choose_tokens


@torch.inference_mode()
def generate(model: LoadedModel, rows: Sequence[EncodedRow], pulse: Pulse, measurements: Measurements) -> list[Answer]:
    """Answer the rows, which share one way of choosing tokens. Raises StopRequested between steps."""
    answers = [Answer(row, model.tokenizer, model.end_tokens) for row in rows]
    choice = choice_of(rows[0].generation)
    tokens_BL, mask_BT = left_padded([row.tokens for row in rows], model.pad_token, model.device)
    positions_BL = (mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
    running, media = answers, on_device(rows, model.module)
    most_tokens = tokens_BL.shape[-1] + max(row.max_new_tokens for row in rows)
    with model.open_cache(rows=len(rows), tokens=most_tokens) as cache:
        while True:
            pulse()
            began = time.monotonic()
            logits_BV = model.next_logits(tokens_BL, mask_BT, positions_BL, cache, media)
            media = {}
            accept(running, logits_BV, choose_tokens(logits_BV, choice, [answer.generator for answer in running]))
            # The tokens were read, so that the device is done.
            measurements.count_pass(tokens_BL.shape, time.monotonic() - began)
            kept = [index for index, answer in enumerate(running) if not answer.is_complete]
            pulse.tokens += len(running)
            if not kept:
                return answers
            newest = [running[index].last_token for index in kept]
            if len(kept) < len(running):
                kept_B = torch.tensor(kept, device=model.device)
                cache.batch_select_indices(kept_B)
                mask_BT, positions_BL = mask_BT[kept_B], positions_BL[kept_B]
                running = [running[index] for index in kept]
            tokens_BL = torch.tensor(newest, device=model.device).unsqueeze(-1)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones((len(kept), 1))], dim=-1)
            positions_BL = positions_BL[:, -1:] + 1


def on_device(rows: Sequence[EncodedRow], module: PreTrainedModel) -> dict[str, Tensor]:
    """What rows of equal media shapes bring besides their tokens, joined, on the model's device and in its dtype."""
    joined = {name: torch.cat([row.media[name] for row in rows]) for name in rows[0].media}
    return {
        name: tensor.to(module.device, module.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in joined.items()
    }


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
            answer.fail("The model computed something that is not a number.")
        else:
            answer.accept(token)
