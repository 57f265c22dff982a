"""What do a model's configuration and the headers of its weight files say? Hostile input; nothing here touches a disk.

Facts that the configuration leaves out are taken from the tensors' shapes; where neither knows, memory is over-estimated.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, TypeGuard

from ollm_service.core.architectures import NATIVE_ARCHITECTURES
from ollm_service.core.plan import GenericModelKind, ModelModality
from ollm_service.core.profile import ModelProfile
from ollm_service.core.providers import family_of

LENGTH_BYTES = 8
LONGEST_HEADER = 16 * 1024**2
# More than any model in use keeps per token; for a model whose shape cannot be read.
UNKNOWN_KV_BYTES_PER_TOKEN = 1024**2
_LARGEST_FACT = 2**40
_MOST_DIMENSIONS = 16
_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
        **dict.fromkeys(("U32", "I32", "F32"), 32),
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    }
)
_DTYPES: Mapping[str, str] = MappingProxyType({"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"})
_ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2})
_NESTED_TEXT = ("text_config", "llm_config", "language_config", "decoder")
_TOWERS = ("vision", "visual", "audio", "encoder.")
_SPEECH_KEYS = ("num_mel_bins", "input_feat_per_channel")


class BrokenCheckpoint(ValueError):
    """The configuration or a weight file's header cannot be trusted; the message says why, for the model's owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor as a safetensors header declares it; its bytes have been checked to lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def element_count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def loaded_bytes(self, dtype: str | None) -> int:
        """Its size in memory: floating-point weights are cast to the model's dtype, packed and quantized ones stay."""
        cast = _ELEMENT_BYTES.get(dtype or "") if self.dtype in _DTYPES else None
        bits = 8 * cast if cast else _BITS[self.dtype]
        return -(-self.element_count * bits // 8)


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises BrokenCheckpoint naming `what` for anything else, however deep or malformed."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{what} is not JSON") from error
    if not isinstance(parsed, dict):
        raise BrokenCheckpoint(f"{what} is not a JSON object")
    return parsed


def header_length(prefix: bytes, file_bytes: int, what: str) -> int:
    """The length of a safetensors header, from the file's first 8 bytes. Raises BrokenCheckpoint where it cannot be."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) != LENGTH_BYTES or length < 2 or LENGTH_BYTES + length > file_bytes:
        raise BrokenCheckpoint(f"{what} is cut short or is not a safetensors file")
    if length > LONGEST_HEADER:
        raise BrokenCheckpoint(f"{what} has a header of {length:,} bytes, more than {LONGEST_HEADER:,}")
    return length


def parse_header(text: bytes, data_bytes: int, what: str) -> tuple[Tensor, ...]:
    """The tensors of a safetensors header; together they must cover the file's data exactly once, as the format demands.

    Raises BrokenCheckpoint.
    """
    spans: list[tuple[int, int]] = []
    tensors: list[Tensor] = []
    for name, entry in parse_object(text, f"the header of {what}").items():
        if name == "__metadata__":
            continue
        tensor, span = _read_entry(name, entry, what)
        tensors.append(tensor)
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise BrokenCheckpoint(f"the tensors of {what} overlap or leave a gap at byte {end:,}")
        end = last
    if end != data_bytes:
        raise BrokenCheckpoint(f"{what} holds {data_bytes:,} bytes of tensors, its header says {end:,}")
    return tuple(tensors)


def shard_names(index: Mapping[str, Any], what: str) -> dict[str, str]:
    """Which shard holds each tensor, from a parsed index. Raises BrokenCheckpoint for a shard outside the folder."""
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BrokenCheckpoint(f"{what} has no weight_map")
    for shard in set(map(str, names.values())):
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard or not shard.endswith(".safetensors"):
            raise BrokenCheckpoint(f"{what} names the shard {shard!r}, which is not a safetensors file in this folder")
    return {name: str(PurePosixPath(shard)) for name, shard in names.items()}


def profile_of(
    *,
    name: str,
    path: PurePosixPath,
    digest: str,
    config: Mapping[str, Any],
    tensors: Sequence[Tensor],
    has_processor: bool = False,
    has_chat_template: bool = False,
) -> ModelProfile:
    """The profile of a sound model folder. `has_processor`: it has a processor's or a preprocessor's configuration.

    Raises BrokenCheckpoint where only code that comes with the model could load it.
    """
    architecture = _architecture(config)
    if config.get("auto_map") and architecture not in NATIVE_ARCHITECTURES:
        raise BrokenCheckpoint(f"it needs remote code: transformers has no {architecture or 'such architecture'} of its own")
    kind, modalities = _kind_and_modalities(config, architecture, has_processor=has_processor)
    text = _text_config(config)
    dtype = _dtype(config, text, tensors)
    model_type = config.get("model_type")
    return ModelProfile(
        name=name,
        path=path,
        digest=digest,
        architecture=architecture,
        model_type=model_type if isinstance(model_type, str) else None,
        family=family_of(architecture),
        kind=kind,
        modalities=modalities,
        requires_processor=kind is GenericModelKind.IMAGE_TEXT_TO_TEXT or ModelModality.AUDIO in modalities,
        dtype=dtype,
        weight_bytes=sum(tensor.loaded_bytes(dtype) for tensor in tensors),
        parameter_count=sum(tensor.element_count for tensor in tensors),
        layer_count=_layers(text),
        hidden_size=_hidden(text),
        intermediate_size=_intermediate(text),
        vocabulary_size=_fact(text, "vocab_size") or _embedding_rows(tensors),
        attention_heads=_heads(text),
        kv_bytes_per_token=_kv_bytes_per_token(text, tensors, dtype),
        max_context_tokens=_fact(text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx") or None,
        has_chat_template=has_chat_template,
    )


def _read_entry(name: str, entry: Any, what: str) -> tuple[Tensor, tuple[int, int]]:
    problem = BrokenCheckpoint(f"the tensor {name[:80]!r} of {what} is malformed")
    if not isinstance(entry, dict):
        raise problem
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS or not _are_sizes(shape) or not _are_sizes(span):
        raise problem
    tensor = Tensor(name=name, dtype=dtype, shape=tuple(shape))
    if len(span) != 2 or (span[1] - span[0]) * 8 != tensor.element_count * _BITS[dtype]:
        raise problem
    return tensor, (span[0], span[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return False
    return all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value)


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) and first.isidentifier() and len(first) <= 128 else None


def _kind_and_modalities(
    config: Mapping[str, Any], architecture: str | None, *, has_processor: bool
) -> tuple[GenericModelKind | None, tuple[ModelModality, ...]]:
    """The first row that fits; the encoder-decoder flag comes first, since such models often carry stray processor files."""
    sees = config.get("vision_config") is not None
    hears = config.get("audio_config") is not None or any(key in config for key in _SPEECH_KEYS)
    present = [ModelModality.IMAGE] * sees + [ModelModality.AUDIO] * hears
    modalities = (ModelModality.TEXT, *present)
    name = architecture or ""
    if config.get("is_encoder_decoder") is True and not present:
        return GenericModelKind.SEQ2SEQ_LM, modalities
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return GenericModelKind.CAUSAL_LM, (ModelModality.TEXT,)
    if name.endswith("ForConditionalGeneration") and (sees or (has_processor and not hears)):
        return GenericModelKind.IMAGE_TEXT_TO_TEXT, modalities
    return None, modalities


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the configuration that describes the language model."""
    nested = next((config[key] for key in _NESTED_TEXT if isinstance(config.get(key), dict)), None)
    return config if nested is None else nested


def _fact(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that is a sensible positive whole number, else 0."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST_FACT:
            return value
    return 0


def _layers(text: Mapping[str, Any]) -> int:
    return _fact(text, "num_hidden_layers", "n_layer", "n_layers", "num_decoder_layers", "decoder_layers", "num_layers")


def _hidden(text: Mapping[str, Any]) -> int:
    return _fact(text, "hidden_size", "n_embd", "d_model", "dim")


def _heads(text: Mapping[str, Any]) -> int:
    return _fact(text, "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads")


def _intermediate(text: Mapping[str, Any]) -> int:
    routed = _fact(text, "moe_intermediate_size") * max(1, _fact(text, "num_experts_per_tok"))
    dense = _fact(text, "intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "ffn_hidden_size")
    return max(dense, routed) or 4 * _hidden(text)


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any], tensors: Iterable[Tensor]) -> str | None:
    for source in (config, text):
        for key in ("dtype", "torch_dtype"):
            value = source.get(key)
            if isinstance(value, str) and value.removeprefix("torch.") in _ELEMENT_BYTES:
                return value.removeprefix("torch.")
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in _DTYPES:
            counts[_DTYPES[tensor.dtype]] += tensor.element_count
    return max(counts, key=lambda dtype: (counts[dtype], dtype), default=None)


def _kv_bytes_per_token(text: Mapping[str, Any], tensors: Iterable[Tensor], dtype: str | None) -> int:
    """2 · layers · key-value heads · head dimension · bytes of an element, or what the projections' shapes give, if more.

    Every layer counts as full attention, and latent attention by the keys and values that it expands to.
    """
    heads = _heads(text)
    kv_heads = _fact(text, "num_key_value_heads", "num_kv_heads", "n_kv_heads") or heads
    latent = _fact(text, "qk_nope_head_dim") + _fact(text, "qk_rope_head_dim") + _fact(text, "v_head_dim")
    head_dim = _fact(text, "head_dim", "d_kv") or (-(-_hidden(text) // heads) if heads else 0)
    configured = _layers(text) * max(2 * kv_heads * head_dim, heads * latent)
    projected = sum(
        tensor.shape[0]
        for tensor in tensors
        if tensor.name.endswith((".k_proj.weight", ".v_proj.weight"))
        and len(tensor.shape) == 2
        and not any(tower in tensor.name for tower in _TOWERS)
    )
    width = max(configured, projected) or 2 * _layers(text) * _hidden(text)
    return width * _ELEMENT_BYTES.get(dtype or "", 4) or UNKNOWN_KV_BYTES_PER_TOKEN


def _embedding_rows(tensors: Iterable[Tensor]) -> int:
    embeddings = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "lm_head.weight")
    return max((tensor.shape[0] for tensor in tensors if tensor.name.endswith(embeddings) and tensor.shape), default=0)
