"""Small models of every family that planning tells apart, with random weights, made by transformers itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 64
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_mel_bins": 8,
    "max_source_positions": 16,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def _text(**changes: Any) -> dict[str, Any]:
    return {**_TEXT, **changes}


_GPT2: dict[str, Any] = {
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4,
}
_T5: dict[str, Any] = {
    "num_layers": 2,
    "num_decoder_layers": 4,
    "d_model": 16,
    "d_ff": 32,
    "num_heads": 4,
    "d_kv": 8,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 4,
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
}
FAMILIES: Mapping[str, Callable[[], tuple[type[Any], Any]]] = {
    "llama": lambda: (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_text())),
    "llama-tied": lambda: (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_text(tie_word_embeddings=True))),
    "gemma3-text": lambda: (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(**_text(num_hidden_layers=7, sliding_window=8)),
    ),
    "gemma3": lambda: (
        transformers.Gemma3ForConditionalGeneration,
        transformers.Gemma3Config(
            text_config=_text(num_hidden_layers=7, sliding_window=8), vision_config=_VISION, mm_tokens_per_image=4
        ),
    ),
    "qwen3-next": lambda: (
        transformers.Qwen3NextForCausalLM,
        transformers.Qwen3NextConfig(**_text(**_EXPERTS, **_LINEAR, shared_expert_intermediate_size=8)),
    ),
    "qwen3-moe": lambda: (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**_text(**_EXPERTS))),
    "gpt-oss": lambda: (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(**_text(num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    ),
    "voxtral": lambda: (
        transformers.VoxtralForConditionalGeneration,
        transformers.VoxtralConfig(text_config={"model_type": "llama", **_text()}, audio_config=_AUDIO),
    ),
    "t5": lambda: (transformers.T5ForConditionalGeneration, transformers.T5Config(**_T5)),
    "t5-untied": lambda: (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(**{**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    ),
    "bart": lambda: (transformers.BartForConditionalGeneration, transformers.BartConfig(**_BART)),
    "qwen2": lambda: (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**_text())),
    "mistral": lambda: (transformers.MistralForCausalLM, transformers.MistralConfig(**_text(sliding_window=8))),
    "gpt2": lambda: (transformers.GPT2LMHeadModel, transformers.GPT2Config(**_GPT2)),
    "phi3": lambda: (transformers.Phi3ForCausalLM, transformers.Phi3Config(**_text(head_dim=4))),
    "mixtral": lambda: (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**_text(num_local_experts=4, num_experts_per_tok=2)),
    ),
    "deepseek-v3": lambda: (
        transformers.DeepseekV3ForCausalLM,
        transformers.DeepseekV3Config(**_text(head_dim=4, num_key_value_heads=4, **_LATENT)),
    ),
    "deepseek-v3.2": lambda: (
        transformers.DeepseekV32ForCausalLM,
        transformers.DeepseekV32Config(**_text(head_dim=4, num_key_value_heads=4, index_head_dim=16, index_n_heads=4, **_LATENT)),
    ),
    "falcon": lambda: (
        transformers.FalconForCausalLM,
        transformers.FalconConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCABULARY, multi_query=True
        ),
    ),
    "lfm2": lambda: (
        transformers.Lfm2ForCausalLM,
        transformers.Lfm2Config(
            **_text(), layer_types=["conv", "full_attention", "conv", "conv"], conv_L_cache=3, block_multiple_of=8
        ),
    ),
    "mamba2": lambda: (
        transformers.Mamba2ForCausalLM,
        transformers.Mamba2Config(
            hidden_size=16,
            num_hidden_layers=4,
            num_heads=4,
            head_dim=8,
            state_size=6,
            n_groups=1,
            expand=2,
            vocab_size=VOCABULARY,
        ),
    ),
}


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The family's model."""
    torch.manual_seed(0)
    architecture, config = FAMILIES[family]()
    model: Any = architecture(config)
    return model.to(dtype).eval()


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save the family's model in the folder, with just enough beside it to count as whole. Returns the model."""
    model = make(family, dtype)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model
