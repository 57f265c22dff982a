"""What does each decoder layer keep of a row between two forward passes? Keys and values, a window of them, or a state.

Bytes of an element are those of the model's dtype, 4 for recurrent states. How each layer attends follows the configuration as
transformers reads it, how wide its keys and values are follows the shapes of its own projections. Formulae per layer:

  keys and values     rows of its key projection + rows of its value projection; of a fused projection what its queries leave;
                      of latent attention its rank + rope width, + the index width where an index chooses tokens;
                      else 2 · key-value heads · head width. Per token, or per token of the window
  convolution         channels · kernel width. Per row
  recurrence          gated delta rule: value heads · key width · value width; selective state space: inner width · state width;
                      else heads · head width². Per row
  cross attention     the same as keys and values, per token of the source
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ollm_service.core.model_config import ModelConfig
from ollm_service.core.tensors import ELEMENT_BYTES, Tensor

# More than any model in use keeps per token; for a model whose shape cannot be read.
UNKNOWN_KV_BYTES_PER_TOKEN = 1024**2
_STATE_BYTES = 4
_SLIDING = frozenset({"sliding_attention", "chunked_attention", "hybrid_sliding"})
_STATEFUL = frozenset({"linear_attention", "conv", "mamba", "mamba2", "recurrent"})
_BOTH = frozenset({"hybrid", "hybrid_sliding"})
_NEITHER = frozenset({"moe", "mlp", "dummy"})
# Configurations older than `layer_types`: every n-th layer attends in full, the others slide.
_FULL_EVERY: Mapping[str, int] = MappingProxyType(
    {
        "gemma2": 2,
        "gpt_oss": 2,
        "cohere2": 4,
        "exaone4": 4,
        "olmo3": 4,
        "llama4_text": 4,
        "gemma3n_text": 5,
        "gemma3": 6,
        "gemma3_text": 6,
        "gemma4_text": 6,
    }
)
# Those that slide in every layer wherever they name a window.
_ALL_SLIDE = frozenset({"mistral", "mixtral", "ministral", "phi3", "phimoe", "phi4_multimodal", "starcoder2"})
_CROSS = re.compile(r"EncDecAttention|encoder_attn|cross_attn|crossattention|cross_attention")
_PROJECTION = re.compile(r"\.(?:k_proj|v_proj|k|v|key|value)\.weight$")
_VALUE = re.compile(r"\.(?:v_proj|v|value)\.weight$")
_FUSED = re.compile(r"\.(?:qkv_proj|query_key_value|Wqkv|c_attn)\.weight$")
_CONVOLUTION = re.compile(r"(?:conv1d|\.conv)\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowState:
    """What one row keeps, in bytes: per token, per token of the window, for the whole row, and per token of the source.

    `widest_per_token` is what the one layer keeps whose keys and values are the widest.
    """

    full_per_token: int
    sliding_per_token: int
    window: int | None
    per_row: int
    cross_per_token: int
    widest_per_token: int


def row_state(config: ModelConfig, layers: Sequence[Sequence[Tensor]], dtype: str | None) -> RowState:
    """Sum over the layers. Without layers that could be told apart all count as the configuration describes one."""
    element = ELEMENT_BYTES.get(dtype or "", 4)
    count = len(layers) or config.layer_count
    window = config.fact("sliding_window", "attention_chunk_size") or None
    full = sliding = cross = per_row = widest = 0
    for index, kind in enumerate(_kinds(config, count, window)):
        tensors = layers[index] if layers else ()
        width = 0 if kind in _STATEFUL | _NEITHER else _width(config, tensors)
        if kind in _SLIDING and window:
            sliding += width
        else:
            full += width
        widest = max(widest, width)
        cross += _projected(tensors, is_cross=True)
        per_row += _state_bytes(config, tensors, element, must=kind in _STATEFUL | _BOTH)
    full, widest = full * element, widest * element
    if not (full or sliding or per_row):
        full = widest = UNKNOWN_KV_BYTES_PER_TOKEN
    return RowState(
        full_per_token=full,
        sliding_per_token=sliding * element,
        window=window if sliding else None,
        per_row=per_row,
        cross_per_token=cross * element,
        widest_per_token=widest,
    )


def _kinds(config: ModelConfig, count: int, window: int | None) -> list[str]:
    """How each layer attends. Layers that use the keys and values of earlier ones keep none."""
    named = config.words("layer_types", "layers_block_type")
    kinds = list(named) if len(named) == count else [_default_kind(config, index, window) for index in range(count)]
    shared = min(config.fact("num_kv_shared_layers"), count)
    return kinds[: count - shared] + ["dummy"] * shared


def _default_kind(config: ModelConfig, index: int, window: int | None) -> str:
    family = config.text_type
    slides = family in _ALL_SLIDE
    if config.flag("use_sliding_window"):
        slides = index >= config.fact("max_window_layers")
    elif family in _FULL_EVERY:
        slides = (index + 1) % (config.fact("sliding_window_pattern") or _FULL_EVERY[family]) != 0
    return "sliding_attention" if slides and window and config.flag("use_sliding_window") is not False else "full_attention"


def _width(config: ModelConfig, tensors: Sequence[Tensor]) -> int:
    """Elements of keys and values that the layer keeps for a token."""
    measured = _projected(tensors, is_cross=False)
    if measured:
        return measured
    names = [tensor.name for tensor in tensors]
    if tensors and not any("att" in name.lower() and not _CROSS.search(name) for name in names):
        return 0  # it has no attention, or none but to the source
    latent = config.fact("kv_lora_rank")
    if latent:
        return latent + config.fact("qk_rope_head_dim") + config.fact("index_head_dim")
    queries = config.heads * config.head_size
    for tensor in tensors:
        if tensor.is_plain_matrix and _FUSED.search(tensor.name):
            # gpt2's own kind of layer keeps its matrix the other way round
            left = (max(tensor.shape) if tensor.name.endswith("c_attn.weight") else tensor.shape[0]) - queries
            if left > 0:
                return left
    return 2 * config.key_value_heads * config.head_size or 2 * config.hidden_size


def _projected(tensors: Sequence[Tensor], *, is_cross: bool) -> int:
    """Rows of the key and value projections; where keys serve as values too, twice those of the keys."""
    found = [
        tensor
        for tensor in tensors
        if tensor.is_plain_matrix and _PROJECTION.search(tensor.name) and bool(_CROSS.search(tensor.name)) is is_cross
    ]
    values = sum(tensor.shape[0] for tensor in found if _VALUE.search(tensor.name))
    keys = sum(tensor.shape[0] for tensor in found) - values
    return keys + (values or keys)


def _state_bytes(config: ModelConfig, tensors: Sequence[Tensor], element: int, *, must: bool) -> int:
    """Bytes of the layer's convolution and recurrence for a row; `must` for a layer that is known to have them."""
    convolutions = [tensor for tensor in tensors if len(tensor.shape) == 3 and _CONVOLUTION.search(tensor.name)]
    if not convolutions and not must:
        return 0
    held = sum(tensor.shape[0] * tensor.shape[2] for tensor in convolutions) * element
    return held + _recurrence(config, tensors) * _STATE_BYTES


def _recurrence(config: ModelConfig, tensors: Sequence[Tensor]) -> int:
    """Elements of the recurrent state."""
    delta = config.fact("linear_num_value_heads") * config.fact("linear_key_head_dim") * config.fact("linear_value_head_dim")
    if delta:
        return delta
    decay = next((tensor for tensor in tensors if tensor.name.endswith("A_log")), None)
    if decay is not None and len(decay.shape) == 2:
        return decay.element_count
    width = config.fact("ssm_state_size", "mamba_d_state", "state_size")
    inner = config.fact("mamba_head_dim", "mamba_d_head", "head_dim")
    if decay is not None and width and inner:
        return decay.element_count * width * inner
    if config.fact("conv_L_cache"):
        return 0  # it keeps its convolution alone
    return config.heads * config.head_size**2
