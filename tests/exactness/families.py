"""Which models does the grid hold against plain transformers? One line for each family, and what its models are made of.

A model's characters are its tokens, and no answer has special tokens or ends by itself: so equal texts are equal tokens. Voxtral
has no line yet, as the runner answers with no audio model; its language model is a Llama. A family joins by a line in `FAMILIES`;
tests/families.py says how its model is made.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from scripts.train_demo_model import make_tokenizer
from tests import families
from workers.runner.weights.export import export_model

CONTEXT = 4096
# Wide enough that random weights give varied answers.
SPREAD = 0.3

FAMILIES = (
    "llama",
    "gemma3-text",
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


def save(family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, asks_all_experts: bool = False) -> Path:
    """Make a model of the family with random weights and save it in `folder`, with a tokenizer.

    `asks_all_experts` has every token ask every expert, where there are experts: rounding can then send none to another.
    """
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
        model.get_output_embeddings().weight[_never_answered(tokenizer)] = 0
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family == "gpt-oss":
        export_model(folder)  # without an export its provider takes no model
    return folder


def _never_answered(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens whose text does not come back as the same token: special ones, and space, which Qwen's tokenizer leaves out."""
    return [*tokenizer.all_special_ids, *(tokenizer.get_vocab()[space] for space in (" ", "\n"))]


def _expert_count(config: Any) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return int(next(getattr(config, name) for name in names if hasattr(config, name)))
