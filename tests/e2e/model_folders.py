"""What may lie in a models root that must never be loaded? The demo model, spoilt in one way each."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.e2e.fleet import DEMO_MODELS
from tests.e2e.scripted_jobs import MODEL


def make_models_root(root: Path) -> None:
    """A models root with the demo model and, beside it, one folder for each way to spoil it."""
    shutil.copytree(DEMO_MODELS / MODEL, root / MODEL)
    for name, spoil in SPOILT.items():
        shutil.copytree(DEMO_MODELS / MODEL, root / name)
        spoil(root / name)


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def _broken_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = '{"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _link_out_of_the_root(folder: Path) -> None:
    weights = folder / "model.safetensors"
    outside = folder.parent.parent / "outside.safetensors"
    shutil.move(weights, outside)
    weights.symlink_to(outside)


# Each way to spoil a model, and below, a word that its refusal must hold.
SPOILT: Mapping[str, Callable[[Path], None]] = {
    "pickled": _pickle,
    "broken-header": _broken_header,
    "missing-shard": _missing_shard,
    "linked-out": _link_out_of_the_root,
}
REASONS: Mapping[str, str] = {
    "pickled": "pytorch_model.bin",
    "broken-header": "not a safetensors file",
    "missing-shard": "model-00001-of-00002.safetensors",
    "linked-out": "link",
}
