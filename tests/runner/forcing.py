"""Which logits follow when rows are fed given tokens? With transformers' own cache, or with one of ours."""

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from workers.runner.decoding import left_padded
from workers.runner.kv.strategy import Strategy, cache_in_files
from workers.runner.kv.traffic import Traffic

# Makes of a mask of all tokens so far the one that plain attention gets.
Hide = Callable[[Tensor], Tensor]


@cache
def loaded(folder: Path) -> Any:
    """The model in the folder."""
    return AutoModelForCausalLM.from_pretrained(folder)


def tokens_of(folder: Path, text: str) -> list[int]:
    """The text's tokens without special ones."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def plain_logits(folder: Path, prompts: Sequence[str], forced: str, hide: Hide = lambda mask: mask) -> Tensor:
    """Logits [B, 1 + forced, V] after the prompts and after each forced token, which every row gets; as transformers has them.

    `hide` hides tokens from those that are fed after the prompts.
    """
    return _logits(folder, prompts, forced, DynamicCache(config=loaded(folder).config), hide)


def strategy_logits(folder: Path, prompts: Sequence[str], forced: str, strategy: Strategy) -> tuple[Tensor, Traffic]:
    """The same with a cache of ours, and what that did."""
    traffic = Traffic()
    with (
        tempfile.TemporaryDirectory() as files,
        cache_in_files(loaded(folder), strategy, Path(files), traffic) as ours,
    ):
        return _logits(folder, prompts, forced, ours, lambda mask: mask), traffic


@torch.inference_mode()
def _logits(folder: Path, prompts: Sequence[str], forced: str, kept: Cache, hide: Hide) -> Tensor:
    module = loaded(folder)
    tokens, mask = left_padded([tokens_of(folder, prompt) for prompt in prompts], 0, torch.device("cpu"))
    positions, seen, found = (mask.cumsum(dim=-1) - 1).clamp(min=0), mask, []
    for token in (*tokens_of(folder, forced), None):
        output = module(input_ids=tokens, attention_mask=seen, position_ids=positions, past_key_values=kept, use_cache=True)
        found.append(output.logits[:, -1])
        if token is not None:
            tokens = torch.full((len(prompts), 1), token)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=-1)
            seen, positions = hide(mask), positions[:, -1:] + 1
    return torch.stack(found, dim=1)
