"""Is a raw weight export one that may be read? Its manifest is hostile input.

`gds_export/manifest.json` is an object whose entries are pieces of raw bytes: `{"model.norm.weight": {"path": "norm.raw",
"dtype": "float16", "shape": [16]}}`. A path is relative to the export's folder. Exports of ours have one entry for each *extent*,
which is a piece of one file that is read at once, and lists the tensors in it:

    {"model.layers.0": {"path": "weights.extents", "dtype": "uint8", "shape": [8192], "offset": 4096, "crc32": 3735928559,
     "first": null, "tensors": [["model.layers.0.mlp.up_proj.weight", "float16", [24, 16], 0, 768]]}}

`first` is where a slice begins along the first dimension of its tensors, null where they are whole; a tensor's two numbers are
where it begins in its extent, and its bytes. The entry `""`, of everything that is in no layer, has `origin`, too: what the
export was made of, and by which version of transformers, on which names and layout depend.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ollm_service.core.errors import shown
from ollm_service.core.passing import BLOCK_BYTES

EXPORT_FOLDER = "gds_export"
EXPORT_MANIFEST = f"{EXPORT_FOLDER}/manifest.json"
EXPORT_FORMAT, EXPORT_VERSION = "ollm-extents", 2
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "float32"), 4),
    **dict.fromkeys(("int64", "float64"), 8),
}
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LARGEST = 2**62


def source_digest(digests: Mapping[str, str]) -> str:
    """What an export was made of: sha256 over the names and sha256s of the configuration and the weight files."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def origin_of(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What an export of ours says of itself; None for one of another kind."""
    rest = manifest.get("")
    origin = rest.get("origin") if isinstance(rest, Mapping) else None
    return origin if isinstance(origin, Mapping) else None


def export_problem(manifest: Mapping[str, Any], sizes: Mapping[str, int], source: str | None = None) -> str | None:
    """Why an export cannot be used, None where it can. `sizes` are the safe files of the model's folder, by relative name.

    `source` is the digest of the weights beside it, with which that in an export of ours has to agree; None: not compared.
    """
    if not manifest:
        return "its manifest names no tensor"
    for name, entry in manifest.items():
        problem = _entry_problem(entry, sizes)
        if problem is not None:
            return f"its tensor {shown(name)} {problem}"
    if origin_of(manifest) is None:
        return "its extents have no origin" if any("tensors" in entry for entry in manifest.values()) else None
    return _extents_problem(manifest, sizes) or _origin_problem(manifest, source)


def _entry_problem(entry: Any, sizes: Mapping[str, int]) -> str | None:
    if not isinstance(entry, dict):
        return "is not described by an object"
    path, dtype = entry.get("path"), entry.get("dtype")
    if not isinstance(path, str) or not path:
        return "has no path"
    place = PurePosixPath(path)
    if place.is_absolute() or ".." in place.parts or "\\" in path or not place.parts:
        return f"lies outside the export: {shown(path)}"
    if place.suffix.lower() in PICKLE_SUFFIXES:
        return f"may be a pickle: {shown(path)}"
    if str(PurePosixPath(EXPORT_FOLDER) / place) not in sizes:
        return f"is missing: {shown(path)}"
    if not isinstance(dtype, str) or dtype.startswith("torch"):
        return f"has a dtype that is not plain: {shown(dtype)}"
    if entry.get("packed") == "mxfp4":
        return "is packed as mxfp4"
    return None


def _origin_problem(manifest: Mapping[str, Any], source: str | None) -> str | None:
    origin = origin_of(manifest) or {}
    digest = origin.get("digest")
    if (origin.get("format"), origin.get("schema_version")) != (EXPORT_FORMAT, EXPORT_VERSION):
        return f"it has another format than `{EXPORT_FORMAT}` version {EXPORT_VERSION}; export the model anew"
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not isinstance(origin.get("transformers"), str):
        return "its origin is not told"
    if source is not None and digest != source:
        return "it was made of other weights than those beside it; export the model anew"
    return None


def _extents_problem(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
    """Extents lie in one file, one after another, and the slices of one owner in their order and one after another."""
    file, end, rows, owner = manifest[""]["path"], 0, 0, ""
    for name, entry in manifest.items():
        problem = _extent_problem(name, entry)
        if problem is not None:
            return f"its extent {shown(name)} {problem}"
        if entry["path"] != file or entry["offset"] != end:
            return f"its extent {shown(name)} does not follow the one before it"
        end += entry["shape"][0]
        if entry["first"] is not None:
            here = name.rpartition("/")[0]
            rows = rows if here == owner else 0
            if entry["first"] != rows:
                return f"its extent {shown(name)} does not begin where the slice before it ends"
            rows, owner = rows + entry["tensors"][0][2][0], here
        else:
            owner = ""
    there = sizes[str(PurePosixPath(EXPORT_FOLDER) / file)]
    return None if end <= there else f"its file {shown(file)} has {there:,} bytes, its extents {end:,}"


def _extent_problem(name: str, entry: Mapping[str, Any]) -> str | None:
    shape, offset, first, tensors = (entry.get(key) for key in ("shape", "offset", "first", "tensors"))
    if entry["dtype"] != "uint8" or not isinstance(shape, list) or len(shape) != 1 or not _is_count(shape[0]):
        return "is no piece of bytes"
    if not isinstance(offset, int) or not _is_count(offset) or offset % BLOCK_BYTES or shape[0] % BLOCK_BYTES:
        return "does not begin and end with a block"
    if not _is_count(entry.get("crc32")) or entry["crc32"] >= 2**32:
        return "has no checksum"
    if first is not None and (not _is_count(first) or "/" not in name):
        return "is a slice of nothing"
    if not isinstance(tensors, list) or (first is not None and not tensors):
        return "lists no tensors"
    return next((problem for tensor in tensors if (problem := _tensor_problem(tensor, shape[0], first))), None)


def _tensor_problem(tensor: Any, extent_bytes: int, first: int | None) -> str | None:
    if not isinstance(tensor, list) or len(tensor) != 5:
        return "lists a tensor wrongly"
    name, dtype, shape, offset, size = tensor
    if not isinstance(name, str) or not name or not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"lists a tensor without a name or of an unknown dtype: {shown(dtype)}"
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or (first is not None and not shape):
        return f"lists a shape wrongly, of {shown(name)}"
    element = DTYPE_BYTES[dtype]
    if not _is_count(offset) or not _is_count(size) or size != math.prod(shape) * element:
        return f"lists bytes wrongly, of {shown(name)}"
    return None if offset % element == 0 and offset + size <= extent_bytes else f"does not hold {shown(name)}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST
