"""What do a model's tensors weigh in memory, part by part? From their names and shapes alone.

A tensor belongs to the decoder layer whose number is the first in its name. What transformers does not load is not counted:
layers beyond the configured ones and heads that predict further tokens, masks and rotary frequencies that older versions saved,
and copies of shared embeddings. Where head and embedding are both there, both count, though the configuration may say that they
are one: only their numbers can tell, and `tied_pair` says which ones to compare.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ollm_service.core.model_config import MOST_LAYERS, ModelConfig
from ollm_service.core.quantization import COMPRESSED_TENSORS, fewest_bits, is_gone_when_plain, is_unpacked
from ollm_service.core.tensors import BITS, ELEMENT_BYTES, FLOATS, Tensor

TOWERS = ("vision", "visual", "image", "audio", "speech", "encoder", "qformer")
_EMBEDDINGS = (
    *("embed_tokens", "wte", "wpe", "word_embeddings", "shared", "embed_in", "embeddings", "embed_positions"),
    *("tok_embeddings", "position_embeddings", "embed_tokens_per_layer"),
)
_HEADS = ("lm_head", "embed_out", "output", "output_layer")
_FURTHER_TOKENS = re.compile(r"(?:^|\.)mtp\.")
_LEFT_BEHIND = re.compile(r"(?:inv_freq|\.masked_bias)$")
_SAVED_MASK = re.compile(r"\.attn(?:ention)?\.bias$")
_ROUTED = re.compile(r"\.experts\.")
_NUMBERED = re.compile(r"\.experts\.\d+\.")
# Kept in float32 in models of half precision, by transformers' own rule for T5's kin.
_WIDE_IN_HALF = re.compile(r"\.DenseReluDense\.wo\.weight$")
_PACKED, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model's tensors, told apart. Sizes in bytes as loaded; `layer_tensors` are those of each decoder layer.

    `joined`: experts of which each has tensors of its own, where modules have one for all, and what is unpacked.
    """

    total: int
    parameter_count: int
    layer_tensors: tuple[tuple[Tensor, ...], ...]
    layers: tuple[int, ...]
    embedding: int
    head: int
    layer_experts: tuple[int, ...]
    joined: int

    @property
    def experts(self) -> int:
        """The routed experts of all layers."""
        return sum(self.layer_experts)


def weigh(tensors: Iterable[Tensor], config: ModelConfig, dtype: str | None) -> Weights:
    """Tell the tensors of a checkpoint apart. Without layers that can be told apart, all counts in the total alone."""
    kept = [tensor for tensor in tensors if _is_loaded(tensor)]
    prefix, count = _decoder(kept, config.layer_count)
    layers: list[list[Tensor]] = [[] for _ in range(count)]
    rest: list[Tensor] = []
    for tensor in kept:
        place = _place(tensor.name)
        if place is None or place[0] != prefix:
            rest.append(tensor)
        elif place[1] < count:
            layers[place[1]].append(tensor)
    rest = _without_copies(rest)

    def size(part: Iterable[Tensor]) -> int:
        return sum(_loaded_bytes(tensor, config, dtype) for tensor in part)

    embeddings = [tensor for tensor in rest if _is_named(tensor, _EMBEDDINGS)]
    heads = [tensor for tensor in rest if _is_named(tensor, _HEADS)]
    if not any(tensor.name.endswith("weight") for tensor in embeddings):
        embeddings, heads = heads, []  # the one matrix of a tied pair may bear either name
    in_layers = [tensor for layer in layers for tensor in layer]
    routed = [[tensor for tensor in layer if _is_routed(tensor, config.expert_count)] for layer in layers]
    return Weights(
        total=size(in_layers) + size(rest),
        parameter_count=sum(_parameters(tensor, config) for tensor in (*in_layers, *rest)),
        layer_tensors=tuple(map(tuple, layers)),
        layers=tuple(map(size, layers)),
        embedding=size(embeddings),
        head=size(heads),
        layer_experts=tuple(map(size, routed)),
        joined=size(tensor for tensor in (*in_layers, *rest) if _is_joined(tensor, config)),
    )


def tied_pair(tensors: Iterable[Tensor], config: ModelConfig) -> tuple[Tensor, Tensor] | None:
    """Head and embedding that the configuration ties though the file has both: transformers loads one where they are equal."""
    is_tied = config.whole.get("tie_word_embeddings", config.text.get("tie_word_embeddings"))
    if is_tied is not True:
        return None
    matrices = [tensor for tensor in tensors if tensor.name.endswith(".weight") and len(tensor.shape) == 2]
    heads = [tensor for tensor in matrices if _is_named(tensor, _HEADS)]
    for head in heads:
        for tensor in matrices:
            if _is_named(tensor, _EMBEDDINGS) and (tensor.dtype, tensor.shape) == (head.dtype, head.shape):
                return head, tensor
    return None


def _is_loaded(tensor: Tensor) -> bool:
    if _FURTHER_TOKENS.search(tensor.name) or _LEFT_BEHIND.search(tensor.name):
        return False
    return not (len(tensor.shape) == 4 and _SAVED_MASK.search(tensor.name))


def _place(name: str) -> tuple[str, int] | None:
    """The first number in a name, with what stands before it: `model.layers`, 7."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) <= len(str(MOST_LAYERS)):
            return ".".join(parts[:position]), int(part)
    return None


def _decoder(tensors: Sequence[Tensor], configured: int) -> tuple[str, int]:
    """Where the decoder layers stand, and how many there are: the heaviest unbroken sequence of the configured length."""
    numbers: dict[str, set[int]] = defaultdict(set)
    elements: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        place = _place(tensor.name)
        if place is not None and place[1] < (configured or MOST_LAYERS):
            numbers[place[0]].add(place[1])
            elements[place[0]] += tensor.element_count
    whole = [prefix for prefix, seen in numbers.items() if len(seen) == (configured or max(seen) + 1)]
    best = max(whole, key=lambda prefix: (not _is_tower(prefix), elements[prefix], prefix), default="")
    return best, len(numbers[best])


def _is_tower(name: str) -> bool:
    return any(tower in name for tower in TOWERS)


def _is_named(tensor: Tensor, names: tuple[str, ...]) -> bool:
    path = tensor.name.split(".")
    return len(path) >= 2 and path[-2] in names and not _is_tower(tensor.name)


def _without_copies(rest: Sequence[Tensor]) -> list[Tensor]:
    """Encoder and decoder embed with the `shared` matrix where there is one; older files hold it once for each."""
    shared = {tensor.shape for tensor in rest if tensor.name.endswith("shared.weight")}
    return [tensor for tensor in rest if not (tensor.shape in shared and tensor.name.endswith("coder.embed_tokens.weight"))]


def _is_routed(tensor: Tensor, expert_count: int) -> bool:
    fused = len(tensor.shape) == 3 and expert_count > 0 and tensor.shape[0] == expert_count
    return fused or _ROUTED.search(tensor.name) is not None


def _is_joined(tensor: Tensor, config: ModelConfig) -> bool:
    is_packed = is_unpacked(config.quantization) and tensor.dtype not in FLOATS
    return is_packed or _NUMBERED.search(tensor.name) is not None


def _loaded_bytes(tensor: Tensor, config: ModelConfig, dtype: str | None) -> int:
    if config.quantization == "mxfp4" and tensor.dtype == "U8":
        # Two numbers a byte, unpacked to bfloat16 where the packed form has no kernels; their scales are then gone.
        return 4 * tensor.element_count if tensor.name.endswith(_PACKED) else 0
    if config.quantization == COMPRESSED_TENSORS and (is_gone_when_plain(tensor.name) or tensor.dtype not in FLOATS):
        return _parameters(tensor, config) * ELEMENT_BYTES.get(dtype or "", 4)
    if dtype == "float16" and _WIDE_IN_HALF.search(tensor.name):
        return tensor.loaded_bytes("float32")
    return tensor.loaded_bytes(dtype)


def _parameters(tensor: Tensor, config: ModelConfig) -> int:
    if config.quantization == "mxfp4" and tensor.dtype == "U8":
        return 2 * tensor.element_count if tensor.name.endswith(_PACKED) else 0
    if config.quantization == COMPRESSED_TENSORS:
        if is_gone_when_plain(tensor.name):
            return 0
        is_packed = tensor.name.endswith("weight_packed")
        return (
            tensor.element_count
            * BITS[tensor.dtype]
            // (fewest_bits(config.quantization_scheme) if is_packed else BITS[tensor.dtype])
        )
    return tensor.element_count
