"""Which token comes next? Greedy, or drawn with a generator of the row's own.

B rows, V vocabulary. A row's draws depend on its seed and its logits alone, never on the rows beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ollm_service.core.options import GenerationConfig

Choice = tuple[float, float | None, int | None]


def choice_of(generation: GenerationConfig) -> Choice:
    """What tokens that are chosen together must share: temperature, top_p, top_k. Seeds and limits are each row's own."""
    return (0.0, None, None) if generation.is_greedy else (generation.temperature, generation.top_p, generation.top_k)


def make_generator(seed: int | None) -> torch.Generator:
    """The source of one row's randomness; without a seed it differs from run to run."""
    generator = torch.Generator(device="cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def choose_tokens(logits_BV: Tensor, choice: Choice, generators: Sequence[torch.Generator | None]) -> list[int]:
    """One token a row. All rows share temperature, top_p and top_k; temperature 0 takes the best token."""
    temperature, top_p, top_k = choice
    if temperature == 0:
        return [int(token) for token in logits_BV.argmax(dim=-1).tolist()]
    probabilities_BV = warp(logits_BV.float().cpu(), temperature, top_p, top_k)
    # The largest p/e with e exponential is a draw from p: the same draw as torch.multinomial, with one generator a row.
    noise_BV = torch.stack([torch.empty(logits_BV.shape[-1]).exponential_(generator=generator) for generator in generators])
    return [int(token) for token in (probabilities_BV / noise_BV).argmax(dim=-1).tolist()]


def warp(logits_BV: Tensor, temperature: float, top_p: float | None, top_k: int | None) -> Tensor:
    """Probabilities [B, V] after temperature, then top_k, then top_p, in the order and with the meaning of transformers."""
    scores_BV = logits_BV / temperature
    if top_k is not None and top_k < scores_BV.shape[-1]:
        least_B1 = scores_BV.topk(top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    if top_p is not None and top_p < 1:
        ascending_BV, order_BV = scores_BV.sort(dim=-1)
        dropped_BV = ascending_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped_BV[:, -1] = False
        scores_BV = scores_BV.masked_fill(dropped_BV.scatter(-1, order_BV, dropped_BV), -torch.inf)
    return scores_BV.softmax(dim=-1)
