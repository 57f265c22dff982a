"""What do weights take on a device where they do not stay? Slots through which they pass, sizes in bytes.

A layer passes whole, or with moe-routing without its experts, which come one by one. A vocabulary that stays on disk is the input
embedding, of which single rows are read, and the output head, which passes in tiles. `workers/runner/weights` does all this.
"""

import math
from collections.abc import Collection

from ollm_service.core.profile import ModelProfile

MIB = 1024**2
DEVICE_SLOTS, HOST_SLOTS = 2, 3  # a layer computes while the next arrives; on the way from disk a third is being read
EXPERT_SLOTS = 4  # one expert computes while the next are read
TILE_BYTES = 32 * MIB
BLOCK_BYTES = 4096  # what is read by itself begins and ends with one


def passing_layers(profile: ModelProfile, *, is_routed: bool) -> tuple[int, ...]:
    """What of each layer comes in one piece."""
    experts = _experts(profile) if is_routed else ()
    return (
        tuple(size - inner for size, inner in zip(profile.layer_bytes, experts, strict=True)) if experts else profile.layer_bytes
    )


def passing_experts(profile: ModelProfile, *, is_routed: bool) -> tuple[int, ...]:
    """One expert of each layer, with its padding; nothing where layers come whole."""
    experts = _experts(profile) if is_routed else ()
    return tuple(-(-size // profile.expert_count) + 2 * BLOCK_BYTES for size in experts) or (0,) * len(profile.layer_bytes)


def slots_bytes(profile: ModelProfile, layers: Collection[int], *, is_routed: bool, vocabulary_on_disk: bool) -> int:
    """What these layers, and the head where it comes with them, take of the device while they pass. Without layers nothing."""
    if not layers:
        return 0
    whole, experts = passing_layers(profile, is_routed=is_routed), passing_experts(profile, is_routed=is_routed)
    largest = max(whole[layer] for layer in layers)
    return slots_of(profile, largest, max(experts[layer] for layer in layers), vocabulary_on_disk=vocabulary_on_disk)


def slots_of(profile: ModelProfile, largest_layer: int, largest_expert: int, *, vocabulary_on_disk: bool) -> int:
    """The same, where the largest that passes is known."""
    return DEVICE_SLOTS * max(largest_layer, tile_bytes(profile) * vocabulary_on_disk) + EXPERT_SLOTS * largest_expert


def vocabulary_bytes(profile: ModelProfile) -> int:
    """What the matrices with a row for each token weigh; 0 where the profile does not tell them from other weights.

    A table of positions counts with the embeddings, and stays.
    """
    matrix = profile.vocabulary_size * profile.hidden_size * profile.element_bytes
    if not matrix or profile.embedding_bytes < matrix or 0 < profile.head_bytes < matrix:
        return 0
    both = matrix * (2 if profile.head_bytes else 1)
    return both if both <= profile.weight_bytes - sum(profile.layer_bytes) else 0


def tile_rows(row_bytes: int) -> int:
    """Rows of a tile: as many as `TILE_BYTES` hold, or more so that a tile is of whole blocks and joins the next."""
    step = BLOCK_BYTES // math.gcd(row_bytes, BLOCK_BYTES)
    return max(step, TILE_BYTES // row_bytes // step * step)


def tile_bytes(profile: ModelProfile) -> int:
    """What one tile of the head takes at the most."""
    row = profile.hidden_size * profile.element_bytes
    rows = min(profile.vocabulary_size, tile_rows(row)) if row else 0
    return -(-rows * row // BLOCK_BYTES) * BLOCK_BYTES


def _experts(profile: ModelProfile) -> tuple[int, ...]:
    """The experts of each layer, where they are known and fit the layers."""
    sizes, layers = profile.layer_expert_bytes, profile.layer_bytes
    is_known = profile.expert_count > 0 and len(sizes) == len(layers)
    return sizes if is_known and all(0 <= inner <= size for inner, size in zip(sizes, layers, strict=True)) else ()
