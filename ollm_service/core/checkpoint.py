"""What do a model's configuration and the headers of its weight files say? Hostile input; nothing here touches a disk.

Facts that the configuration leaves out are taken from the tensors' shapes; where neither knows, memory is over-estimated.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeGuard

from ollm_service.core.architectures import NATIVE_ARCHITECTURES
from ollm_service.core.errors import printable
from ollm_service.core.model_config import ModelConfig
from ollm_service.core.plan import GenericModelKind, ModelModality
from ollm_service.core.profile import ModelProfile
from ollm_service.core.providers import family_of
from ollm_service.core.quantization import LOADED_QUANTIZATIONS
from ollm_service.core.row_state import row_state
from ollm_service.core.tensors import BITS, Tensor
from ollm_service.core.weights import weigh

LENGTH_BYTES = 8
LONGEST_HEADER = 16 * 1024**2
_MOST_DIMENSIONS = 16
_SPEECH_KEYS = ("num_mel_bins", "input_feat_per_channel")


class BrokenCheckpoint(ValueError):
    """The configuration or a weight file's header cannot be trusted; the message says why, for the model's owner."""


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

    Raises BrokenCheckpoint where only code that comes with the model could load it, and for weights that were quantized in a way
    that runners do not load: how much memory they would take is not known then, either.
    """
    facts = ModelConfig.read(config)
    architecture = facts.architecture
    if config.get("auto_map") and architecture not in NATIVE_ARCHITECTURES:
        raise BrokenCheckpoint(f"it needs remote code: transformers has no {architecture or 'such architecture'} of its own")
    is_quantized = facts.whole.get("quantization_config") or facts.text.get("quantization_config")
    if is_quantized and facts.quantization not in LOADED_QUANTIZATIONS:
        how = printable(facts.quantization or "in a way that has no name")
        raise BrokenCheckpoint(
            f"its weights are quantized ({how}), which this version does not load; take plain weights, or one of "
            f"{', '.join(LOADED_QUANTIZATIONS)}"
        )
    kind, modalities = _kind_and_modalities(config, architecture, has_processor=has_processor)
    dtype = facts.dtype(tensors)
    weights = weigh(tensors, facts, dtype)
    kept = row_state(facts, weights.layer_tensors, dtype)
    return ModelProfile(
        name=name,
        path=path,
        digest=digest,
        architecture=architecture,
        model_type=facts.model_type,
        family=family_of(architecture),
        kind=kind,
        modalities=modalities,
        requires_processor=kind is GenericModelKind.IMAGE_TEXT_TO_TEXT or ModelModality.AUDIO in modalities,
        has_processor=has_processor,
        dtype=dtype,
        quantization=facts.quantization,
        weight_bytes=weights.total,
        parameter_count=weights.parameter_count,
        layer_count=facts.layer_count or len(weights.layers),
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        vocabulary_size=facts.fact("vocab_size") or _embedding_rows(tensors),
        attention_heads=facts.heads,
        attention_width=facts.heads * facts.head_size,
        linear_heads=facts.fact("linear_num_value_heads"),
        linear_head_size=max(facts.fact("linear_key_head_dim"), facts.fact("linear_value_head_dim")),
        layer_bytes=weights.layers,
        embedding_bytes=weights.embedding,
        head_bytes=weights.head,
        expert_bytes=weights.experts,
        layer_expert_bytes=weights.layer_experts if weights.experts else (),
        joined_bytes=weights.joined,
        expert_count=facts.expert_count if weights.experts else 0,
        experts_per_token=facts.experts_per_token if weights.experts else 0,
        kv_bytes_per_token=kept.full_per_token,
        sliding_kv_bytes_per_token=kept.sliding_per_token,
        sliding_window=kept.window,
        state_bytes_per_row=kept.per_row,
        cross_kv_bytes_per_token=kept.cross_per_token,
        widest_kv_bytes_per_token=kept.widest_per_token,
        max_context_tokens=facts.context_tokens,
        image_tokens=facts.image_tokens,
        has_chat_template=has_chat_template,
    )


def _read_entry(name: str, entry: Any, what: str) -> tuple[Tensor, tuple[int, int]]:
    problem = BrokenCheckpoint(f"the tensor {name[:80]!r} of {what} is malformed")
    if not isinstance(entry, dict):
        raise problem
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS or not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise problem
    tensor = Tensor(name=name, dtype=dtype, shape=tuple(shape), span=(span[0], span[1]))
    if (span[1] - span[0]) * 8 != tensor.element_count * BITS[dtype]:
        raise problem
    return tensor, (span[0], span[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return False
    return all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value)


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


def _embedding_rows(tensors: Iterable[Tensor]) -> int:
    embeddings = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "lm_head.weight")
    return max((tensor.shape[0] for tensor in tensors if tensor.name.endswith(embeddings) and tensor.shape), default=0)
