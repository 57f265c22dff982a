"""How is a model's raw export made, and how is one opened? Extents in the model's own folder, which are not made again by anyone.

    python -m workers.runner.weights.export MODEL_DIR

`ollm_service/core/gds_export.py` says what the manifest holds and checks it; inspection, which has no torch, checks the same.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from ollm_service.core.checkpoint import BrokenCheckpoint, parse_object, shard_names
from ollm_service.core.gds_export import (
    EXPORT_FOLDER,
    EXPORT_FORMAT,
    EXPORT_MANIFEST,
    EXPORT_VERSION,
    export_problem,
    source_digest,
)
from ollm_service.core.laying_out import SCRATCH
from ollm_service.core.plan import GenericModelKind, PassId
from workers.runner.interruptions import AttemptEnded, PassFailed, first_line
from workers.runner.weights.extents import DATA, CorruptExtents, Extent, ExtentFile, ExtentWriter, Origin, Span, delete_manifest
from workers.runner.weights.repack import loaded_on_disk, write_model

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_UNFINISHED = ".gds_export-unfinished"
_LONGEST_MANIFEST = 16 * 1024**2
_CHUNK_BYTES = 8 * 1024**2


class ExportedExtents(ExtentFile):
    """The extents of an export. They are the user's: never deleted, and what is wrong with them is the pass's failure."""

    def delete(self) -> None:
        """Nothing is deleted."""

    def refusal(self, error: CorruptExtents) -> Exception:
        """The pass's failure."""
        return _failed(f"the export is damaged ({error}); delete `{EXPORT_FOLDER}` in the model's folder and export it anew")


def open_export(model_dir: Path) -> ExportedExtents:
    """A model's export. Whether it was made of the weights beside it, inspection has found out.

    Raises PassFailed where it is not there, not sound, no export of ours, or of another version of transformers; OSError.
    """
    try:
        path = model_dir / EXPORT_MANIFEST
        if path.stat().st_size > _LONGEST_MANIFEST:
            raise _failed(f"the export's manifest is larger than {_LONGEST_MANIFEST:,} bytes")
        manifest = parse_object(path.read_bytes(), EXPORT_MANIFEST)
    except (FileNotFoundError, BrokenCheckpoint) as error:
        raise _failed(f"the export has no manifest that can be read: {first_line(error)}") from error
    problem = export_problem(manifest, _sizes(model_dir))
    if problem is not None:
        raise _failed(f"the export cannot be used: {problem}")
    origin = manifest.get("", {}).get("origin")
    if origin is None:
        raise _failed("the export does not hold extents; make one with `python -m workers.runner.weights.export`")
    if origin["transformers"] != transformers.__version__:
        versions = f"{origin['transformers']}, this worker has {transformers.__version__}"
        raise _failed(f"the export was made by transformers {versions}; export the model anew")
    if manifest[""]["path"] != DATA:
        raise _failed(f"the export's extents are not in `{DATA}`")
    extents = {name: _extent_of(name, entry) for name, entry in manifest.items()}
    return ExportedExtents(
        model_dir / EXPORT_FOLDER, Origin(digest=origin["digest"], transformers=origin["transformers"]), extents
    )


def export_model(model_dir: Path, visit: Callable[[], None] = lambda: None) -> Path:
    """Make a model's export beside its weights, and return its folder; `visit` is called while that gets on.

    One that broke off is gone on with. Raises FileExistsError where there is one, OSError, BrokenCheckpoint, AttemptEnded, and
    whatever transformers raises for a checkpoint that it cannot load.
    """
    target, folder = model_dir / EXPORT_FOLDER, model_dir / _UNFINISHED
    if target.exists():
        raise FileExistsError(f"{target} is there already; delete it first")
    origin = Origin(digest=source_digest(_digests(model_dir)), transformers=transformers.__version__)
    writer = ExtentWriter(folder, origin)
    scratch = folder / SCRATCH
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        module, loader = loaded_on_disk(model_dir, scratch, GenericModelKind.CAUSAL_LM)
        write_model(writer, module, loader, visit)
    finally:
        writer.close()
        shutil.rmtree(scratch, ignore_errors=True)
    _write_manifest(folder / Path(EXPORT_MANIFEST).name, writer.written, origin)
    delete_manifest(folder)
    folder.rename(target)
    return target


def _write_manifest(path: Path, written: dict[str, Extent], origin: Origin) -> None:
    entries: dict[str, Any] = {name: _entry_of(extent) for name, extent in written.items()}
    entries[""]["origin"] = {**origin.header(), "format": EXPORT_FORMAT, "schema_version": EXPORT_VERSION}
    with path.open("w", encoding="utf-8") as file:
        json.dump(entries, file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())


def _entry_of(extent: Extent) -> dict[str, Any]:
    return {
        "path": DATA,
        "dtype": "uint8",
        "shape": [extent.size],
        "offset": extent.offset,
        "crc32": extent.checksum,
        "first": extent.first,
        "tensors": [[span.name, span.dtype, list(span.shape), span.offset, span.size] for span in extent.spans],
    }


def _extent_of(name: str, entry: Any) -> Extent:
    """An entry that was found sound."""
    spans = tuple(
        Span(name=key, dtype=dtype, shape=tuple(shape), offset=offset, size=size)
        for key, dtype, shape, offset, size in entry["tensors"]
    )
    return Extent(
        name=name, offset=entry["offset"], size=entry["shape"][0], checksum=entry["crc32"], spans=spans, first=entry["first"]
    )


def _sizes(model_dir: Path) -> dict[str, int]:
    """The plain files of the export by their names in the model's folder.

    A link counts where it stays in the folder, or in that of the repository if the folder is a snapshot of a hub's cache.
    """
    root = model_dir.resolve()
    home = root.parents[1] if root.parent.name == "snapshots" else root
    found = [path for path in (root / EXPORT_FOLDER).rglob("*") if path.is_file() and home in path.resolve().parents]
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in found}


def _digests(model_dir: Path) -> dict[str, str]:
    """The sha256 of each file that decides what the weights are."""
    if (model_dir / _SINGLE).exists():
        names = {_SINGLE}
    else:
        names = set(shard_names(parse_object((model_dir / _INDEX).read_bytes(), _INDEX), _INDEX).values())
    digests = {}
    for name in ("config.json", *names):
        hasher = hashlib.sha256()
        with (model_dir / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
        digests[name] = hasher.hexdigest()
    return digests


def _failed(reason: str) -> PassFailed:
    return PassFailed(PassId.GDS_EXPORT_WEIGHTS, reason, "CorruptExport")


def main(arguments: Sequence[str]) -> int:
    """Export one model; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.runner.weights.export", description="Export a model's weights as raw extents."
    )
    parser.add_argument("model_dir", type=Path, help="a model's folder with its safetensors files")
    model_dir: Path = parser.parse_args(arguments).model_dir
    try:
        folder = export_model(model_dir)
    except (OSError, ValueError, BrokenCheckpoint, AttemptEnded) as error:
        sys.stderr.write(f"{model_dir}: not exported: {first_line(error)}\n")
        return 1
    sys.stdout.write(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
