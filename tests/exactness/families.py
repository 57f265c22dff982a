"""Which models does the grid hold against plain transformers? One line for each family, and what its models are made of.

A model's characters are its tokens, and no answer has special tokens or ends by itself: so equal texts are equal tokens. A family
joins by a line in `FAMILIES`; tests/families.py says how its model is made, and media_models.py how those that see or hear are.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from scripts.train_demo_model import make_tokenizer
from tests import families
from tests.runner.media_models import never_answered, save_gemma3, save_voxtral
from workers.runner.weights.export import export_model

CONTEXT = 4096
# Wide enough that random weights give varied answers.
SPREAD = 0.3

FAMILIES = (
    "llama",
    "gemma3-text",
    "gemma3",
    "voxtral",
    "qwen3-next",
    "qwen3-moe",
    "gpt-oss",
    "qwen2",
    "gpt2",
    "phi3",
    "mixtral",
    "deepseek-v3",
    "falcon",
    "lfm2",
)


# Those that are also shown images or sounds.
SHOWN: Mapping[str, Callable[..., Path]] = {"gemma3": save_gemma3, "voxtral": save_voxtral}


def save(family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, asks_all_experts: bool = False) -> Path:
    """Make a model of the family with random weights and save it in `folder`, with a tokenizer.

    `asks_all_experts` has every token ask every expert, where there are experts: rounding can then send none to another.
    """
    if family in SHOWN:
        return SHOWN[family](folder, seed=seed, dtype=dtype)
    tokenizer = make_tokenizer()
    architecture, config = families.FAMILIES[family]()
    config.update(
        {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT,
            "initializer_range": SPREAD,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    if asks_all_experts and hasattr(config, "num_experts_per_tok"):
        config.num_experts_per_tok = _expert_count(config)
    torch.manual_seed(seed)
    model: Any = architecture(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():
        # The logit of a token without weight is zero, which is never the largest of a hundred.
        model.get_output_embeddings().weight[never_answered(tokenizer)] = 0
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family == "gpt-oss":
        export_model(folder)  # without an export its provider takes no model
    return folder


def _expert_count(config: Any) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return int(next(getattr(config, name) for name in names if hasattr(config, name)))
