"""Which logits follow when rows are fed given tokens? With transformers' own cache, or with one of ours."""

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from ollm_service.core.packing import BLOCK_TOKENS
from workers.runner.kv.cache import PackCache, layers_of
from workers.runner.kv.strategy import FileStrategy, cache_in_files
from workers.runner.kv.traffic import Traffic
from workers.runner.packed.attachment import PackedModel
from workers.runner.packed.pack import Pack, TokenSequence
from workers.runner.padded import left_padded
from workers.runner.weights.streaming import layer_names

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


def strategy_logits(folder: Path, prompts: Sequence[str], forced: str, strategy: FileStrategy) -> tuple[Tensor, Traffic]:
    """The same in packs, with a cache of ours, and what that did."""
    traffic = Traffic()
    tokens = max(len(tokens_of(folder, text)) for text in prompts) + len(tokens_of(folder, forced))
    with (
        tempfile.TemporaryDirectory() as files,
        cache_in_files(loaded(folder), strategy, Path(files), traffic, rows=len(prompts), tokens=tokens) as ours,
    ):
        return packed_logits(folder, prompts, forced, ours), traffic


@torch.inference_mode()
def packed_logits(
    folder: Path, prompts: Sequence[str], forced: str, kept: PackCache | None = None, block_tokens: int = BLOCK_TOKENS
) -> Tensor:
    """The same in packs, which layers compute in blocks of so many tokens; in memory unless another cache is given."""
    module = loaded(folder)
    cache = PackCache(layers_of(module)) if kept is None else kept
    packed = PackedModel(module, torch.device("cpu"), block_tokens)
    feed, found = tokens_of(folder, forced), []
    rows = [TokenSequence(tokens=tokens_of(folder, text), capacity=0) for text in prompts]
    with packed.attached(layers_in(module)):
        for step, token in enumerate((*feed, None)):
            pack = Pack()
            for row in rows:
                pack.add(row, wanted=1, is_prompt=step == 0)
            found.append(packed.logits(pack, cache))
            for row in rows:
                row.cached = len(row.tokens)
                row.tokens += [] if token is None else [token]
    return torch.stack(found, dim=1)


def layers_in(module: Any) -> list[Any]:
    """Its decoder layers."""
    return [module.get_submodule(name) for name in layer_names(module)]


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
