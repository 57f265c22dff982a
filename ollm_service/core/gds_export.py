"""Is a raw weight export one that may be read? Its manifest is hostile input.

`gds_export/manifest.json` is an object with one entry a tensor: `{"model.norm.weight": {"path": "norm.raw", "dtype": "float16",
"shape": [16]}}`. A path is relative to the export's folder.
"""

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from ollm_service.core.errors import shown

EXPORT_FOLDER = "gds_export"
EXPORT_MANIFEST = f"{EXPORT_FOLDER}/manifest.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def export_problem(manifest: Mapping[str, Any], files: Collection[str]) -> str | None:
    """Why an export cannot be used, None where it can. `files` are the safe files of the model's folder, by relative name."""
    if not manifest:
        return "its manifest names no tensor"
    for name, entry in manifest.items():
        problem = _entry_problem(entry, files)
        if problem is not None:
            return f"its tensor {shown(name)} {problem}"
    return None


def _entry_problem(entry: Any, files: Collection[str]) -> str | None:
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
    if str(PurePosixPath(EXPORT_FOLDER) / place) not in files:
        return f"is missing: {shown(path)}"
    if not isinstance(dtype, str) or dtype.startswith("torch"):
        return f"has a dtype that is not plain: {shown(dtype)}"
    if entry.get("packed") == "mxfp4":
        return "is packed as mxfp4"
    return None
