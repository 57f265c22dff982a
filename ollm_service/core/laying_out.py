"""What does it take to lay a model's weights out by layers, once for each worker, and what says that it was done?

While transformers loads a model it writes some weights anew beside the extents: experts of which each has tensors of its own,
which it joins, and packed weights, which it unpacks. They lie on the cache disk until all extents are there. All sizes are in
bytes. `workers/runner/weights` does it; a raw export in the model's own folder makes it unnecessary.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

from ollm_service.core.passing import BLOCK_BYTES, tile_bytes, vocabulary_bytes
from ollm_service.core.plan import BackendId, PassId, RuntimePlan
from ollm_service.core.profile import ModelProfile

EXTENTS_FORMAT, EXTENTS_VERSION = "ollm-extents", 3
EXTENTS_DATA, EXTENTS_MANIFEST = "weights.extents", "manifest.jsonl"
WRITER_LOCK, SCRATCH = "writer.lock", "loading"  # who holds the lock may have the folder of what is joined
_PIECE_BYTES = 2 * BLOCK_BYTES  # beside a piece's numbers: what pads it and its tensors, and its line in the manifest


def takes_export(plan: RuntimePlan) -> bool:
    """Whether layers that leave the device come from a raw export, so that nothing has to be laid out."""
    return plan.backend_id == BackendId.OPTIMIZED_NATIVE and PassId.GDS_EXPORT_WEIGHTS in plan.specialization_pass_ids


def extents_bytes(profile: ModelProfile) -> int:
    """What a model's extents take of the cache disk at the most, for as long as they are kept."""
    layers, tile = len(profile.layer_bytes), tile_bytes(profile)
    tiles = 2 + vocabulary_bytes(profile) // tile if tile else 0
    pieces = 1 + layers * (1 + profile.expert_count) + tiles
    return profile.weight_bytes + pieces * _PIECE_BYTES


def joined_bytes(profile: ModelProfile) -> int:
    """What lies beside the extents while they are made: of a model of which that is not known, all of its experts."""
    return profile.expert_bytes if profile.joined_bytes is None else profile.joined_bytes


def laying_out_bytes(profile: ModelProfile) -> int:
    """What has to be free on the cache disk before any of it is there."""
    return extents_bytes(profile) + joined_bytes(profile)


def joining_host_bytes(profile: ModelProfile) -> int:
    """Host memory that joining the experts of one layer takes, before anything else of the model is there.

    The largest tensor that comes of it, gates and ups, is two thirds of a layer's experts, and two and a half times that was
    measured: while it is written to the disk it is there twice, and what it was joined of lingers in part.
    """
    largest = max(profile.layer_expert_bytes, default=0) if joined_bytes(profile) else 0
    return largest * 5 // 3


def manifest_header(digest: str, transformers: str) -> dict[str, Any]:
    """The first line of the manifest of extents that were made of this model by this version of transformers."""
    return {"format": EXTENTS_FORMAT, "schema_version": EXTENTS_VERSION, "digest": digest, "transformers": transformers}


def manifest_line(entry: Mapping[str, Any]) -> bytes:
    """An entry behind its own checksum: where tensors lie matters as much as what they hold."""
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def manifest_entry(line: bytes) -> dict[str, Any]:
    """The entry of a line without its end. Raises ValueError for one that was cut or changed."""
    checksum, _, text = line.partition(b" ")
    if int(checksum, 16) != zlib.crc32(text):
        raise ValueError("another checksum than when it was written")
    entry: dict[str, Any] = json.loads(text)
    return entry


def is_last_line(entry: Any) -> bool:
    """Whether a line of a manifest says that all extents are there."""
    return isinstance(entry, dict) and "extents" in entry
