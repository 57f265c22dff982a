"""Which models do the comparisons run, and how are they made? With random weights, but for one that is trained.

Each lies in a folder of its own, with the weights as our runner lays them out beside it, so that it can be deleted alone.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.engine.copying import make_copying_model
from bench.texts import make_tokenizer

LLAMA, LARGE, COPYING, EXPERTS, LONG = "llama-1b", "llama-8b-shape", "copying", "qwen3-experts", "llama-long"
_NO_ENDS: Mapping[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
LARGE_VOCABULARY = 128_256


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """How to make a model in a folder, and how many bytes of disk it needs with our copy of its weights."""

    make: Callable[[Path, bool], None]
    disk_bytes: int


def model_folder(folder: Path, name: str) -> Path:
    """Where the model of that name lies."""
    return folder / name / "models" / name


def dtype() -> torch.dtype:
    """The widest type that this processor computes fast in: bfloat16 without instructions for it is far slower than float32."""

    def seconds(kind: torch.dtype) -> float:
        one, other = torch.randn(128, 1024, dtype=kind), torch.randn(1024, 1024, dtype=kind)
        one @ other
        began = time.perf_counter()
        for _ in range(5):
            one @ other
        return time.perf_counter() - began

    return torch.bfloat16 if seconds(torch.bfloat16) <= seconds(torch.float32) else torch.float32


def _save(config: Any, folder: Path, kind: torch.dtype, *, entries: int | None = None) -> None:
    """A model with random weights, which never ends an answer by itself, and a tokenizer."""
    tokenizer = make_tokenizer(entries)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=kind)  # type: ignore[no-untyped-call]
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _llama(folder: Path, _is_quick: bool) -> None:
    """1.2 GB: 11 layers in bfloat16, 5 in float32."""
    kind = dtype()
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=11 if kind is torch.bfloat16 else 5,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
        **_NO_ENDS,
    )
    _save(config, folder, kind)


def _large(folder: Path, is_quick: bool) -> None:
    """The proportions of Llama 3 8B, 5.6 GB: 32 layers, each width 9/16 of the original's, and its vocabulary."""
    config = transformers.LlamaConfig(
        hidden_size=2304,
        intermediate_size=8064,
        num_hidden_layers=4 if is_quick else 32,
        num_attention_heads=24,
        num_key_value_heads=6,
        head_dim=96,
        tie_word_embeddings=False,
        **_NO_ENDS,
    )
    _save(config, folder, torch.bfloat16, entries=LARGE_VOCABULARY)


def _copying(folder: Path, is_quick: bool) -> None:
    """1.2 GB in float32, so that answers with and without guesses can be compared."""
    make_copying_model(folder, layers=4 if is_quick else 16, width=96_000)


def _experts(folder: Path, _is_quick: bool) -> None:
    """64 experts in each of 12 layers, 8 of them for a token: 0.6 GB of experts in bfloat16."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        **_NO_ENDS,
    )
    _save(config, folder, dtype())


def _long(folder: Path, _is_quick: bool) -> None:
    """Small weights and a large KV cache: 24 KiB for each token in bfloat16."""
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=65_536,
        **_NO_ENDS,
    )
    _save(config, folder, dtype())


_GB = 10**9
MODELS: Mapping[str, Made] = {
    LLAMA: Made(make=_llama, disk_bytes=3 * _GB),
    LARGE: Made(make=_large, disk_bytes=18 * _GB),
    COPYING: Made(make=_copying, disk_bytes=3 * _GB),
    EXPERTS: Made(make=_experts, disk_bytes=3 * _GB),
    LONG: Made(make=_long, disk_bytes=2 * _GB),
}
