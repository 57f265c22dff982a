"""Does a worker know of which models it has the weights by layers, without torch and as its runners would find them?"""

import os
from pathlib import Path

import pytest
import torch
import transformers

from ollm_service.core.laying_out import manifest_line
from workers.cache_folder import take_folder, weights_folder
from workers.laid_out import LaidOut, LaidOutWeights
from workers.probe import Claims, Probe
from workers.runner.weights.extents import DATA, ExtentWriter, Origin

DIGEST = "d" * 64
VERSION = transformers.__version__


def nothing() -> None:
    """What is called while weights are written."""


def lay_out(folder: Path, *, version: str = VERSION, is_finished: bool = True) -> Path:
    """Extents of two layers in the weights folder; the file that holds them."""
    writer = ExtentWriter(folder / DIGEST, Origin(digest=DIGEST, transformers=version))
    for number in range(2):
        writer.append(f"layers.{number}", [("weight", torch.full((100,), float(number)))], nothing)
        writer.settle()
    if is_finished:
        writer.finish()
    writer.close()
    return folder / DIGEST / DATA


def begun(folder: Path) -> LaidOut:
    """All that lies in a model's folder counts as begun."""
    there = sum(path.stat().st_size for path in (folder / DIGEST).rglob("*") if path.is_file())
    return LaidOut(begun_bytes={DIGEST: there})


END = manifest_line({"extents": 2})
WHOLE = LaidOut(whole=frozenset({DIGEST}))


def test_a_model_counts_when_all_of_it_is_there(tmp_path: Path) -> None:
    """Until the manifest's last line it is begun, and what its writer has left beside the extents counts, too."""
    weights = LaidOutWeights(VERSION)
    assert weights.look(None) == weights.look(tmp_path / "nowhere") == weights.look(tmp_path) == LaidOut()
    data = lay_out(tmp_path, is_finished=False)
    beside = data.parent / "loading"
    beside.mkdir()
    (beside / "joined.safetensors").write_bytes(bytes(5000))
    assert weights.look(tmp_path) == begun(tmp_path)
    assert begun(tmp_path).begun_bytes[DIGEST] > 5000 + data.stat().st_size
    lay_out(tmp_path)
    assert weights.look(tmp_path) == WHOLE


@pytest.mark.parametrize("is_gone", [False, True])
def test_extents_that_were_cut_short_are_not_whole(tmp_path: Path, is_gone: bool) -> None:
    """The runner would make them again."""
    weights, data = LaidOutWeights(VERSION), lay_out(tmp_path)
    assert weights.look(tmp_path) == WHOLE
    if is_gone:
        data.unlink()
    else:
        os.truncate(data, data.stat().st_size - 1)
    assert weights.look(tmp_path) == begun(tmp_path)


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_extents_of_another_version_are_not_whole(tmp_path: Path, version: str | None) -> None:
    """Names and layout depend on transformers; where the runners' version is not known, nothing can be told."""
    lay_out(tmp_path)
    assert LaidOutWeights(version).look(tmp_path) == begun(tmp_path)


@pytest.mark.parametrize("line", [b"", b"[]\n", b"{\n", END[:-1], END * 3])
def test_a_manifest_that_cannot_be_read_is_none(tmp_path: Path, line: bytes) -> None:
    """However it is damaged, it makes no model whole and stops nobody."""
    manifest = lay_out(tmp_path).with_name("manifest.jsonl")
    header = manifest.read_bytes().splitlines(keepends=True)[0]
    manifest.write_bytes(header + line)
    assert LaidOutWeights(VERSION).look(tmp_path) == begun(tmp_path)


def test_other_folders_are_passed_over(tmp_path: Path) -> None:
    """Only what is named by a digest is a model."""
    lay_out(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / ("f" * 64)).write_text("no folder")
    assert LaidOutWeights(VERSION).look(tmp_path) == WHOLE


def test_the_fleet_is_told_what_is_laid_out(tmp_path: Path) -> None:
    """With what is free; all slots share it."""
    probe, folder = Probe(Claims(node="n", slots=1), os.environ), take_folder(tmp_path / "kv")
    assert probe.live({}, folder.path, None).laid_out == frozenset()
    lay_out(folder.weights_path, is_finished=False)
    told = probe.live({}, folder.path, None)
    assert (told.laid_out, set(told.begun_bytes)) == (frozenset(), {DIGEST})
    lay_out(weights_folder(folder.path))
    told = probe.live({}, folder.path, None)
    assert (told.laid_out, told.begun_bytes) == (frozenset({DIGEST}), {})
    assert probe.live({}, None, None).laid_out == frozenset()
    folder.release()
