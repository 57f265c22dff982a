"""Which models do the runner's tests use? Small ones with random weights, made and saved by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from scripts.train_demo_model import make_tokenizer

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "demo" / "models" / "sum-chat"
HELDOUT = ROOT / "demo" / "heldout.jsonl"
HELDOUT_ANSWERS = ROOT / "demo" / "heldout_answers.json"
CONTEXT = 1024
# Wide enough that random weights give varied answers.
_SPREAD = 0.3
# Checkpoints of those with experts name and join weights in another way than their modules do.
_GATED: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "gemma3": (Gemma3TextConfig, {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {"num_hidden_layers": 4, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "qwen3-next": (
        Qwen3NextConfig,
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 4,
            "linear_conv_kernel_dim": 4,
        },
    ),
    "mixtral": (
        MixtralConfig,
        {"num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt-oss": (
        GptOssConfig,
        {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def config_of(family: str, tokenizer: PreTrainedTokenizerFast, **larger: Any) -> PreTrainedConfig:
    """A configuration of the family with few layers, or with `larger` sizes.

    gpt2 has neither grouped key heads nor a gated MLP, and a tied head.
    """
    tokens: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": _SPREAD,
    }
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **tokens)
    kind, extra = _GATED[family]
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    config: PreTrainedConfig = kind(**(sizes | tokens | extra | larger))
    return config


def save_model(folder: Path, family: str, *, seed: int = 0, has_chat_template: bool = True, **larger: Any) -> Path:
    """Make a float32 model of the family, whose characters are tokens, and save it in `folder`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        config_of(family, tokenizer, **larger)
    )
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():
        # An end token of no weight is never the best one, so that greedy answers are as long as they may be.
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    if not has_chat_template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def plain_greedy(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """What transformers itself generates for one prompt alone, greedily."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
