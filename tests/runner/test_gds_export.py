"""Is a raw export read as it was written, and refused where it is damaged, hostile, or of other weights?"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ollm_service.core.options import RuntimeConfig
from ollm_service.core.passes import Applied, Failed, NotNeeded
from ollm_service.core.plan import PassId
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.resolution import HeldModel
from ollm_service.core.wire import Execute, Finished, SpecializationFailed
from ollm_service.inspection import DigestCache, inspect_models
from tests.runner.commands import first_outcomes, make_command, only, results_of, run, work_row
from tests.runner.models import plain_greedy, save_model
from tests.runner.test_weights import flip_a_bit, nothing
from workers.runner.backends import generic
from workers.runner.engine import Engine
from workers.runner.interruptions import PassFailed
from workers.runner.weights.export import export_model, main, open_export

GDS = PassId.GDS_EXPORT_WEIGHTS
PROMPTS = ["one two", "a somewhat longer prompt, so that rows are padded"]
NEW_TOKENS = 6
LAYERS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with one gpt-oss that has an export."""
    root = tmp_path_factory.mktemp("exported")
    export_model(save_model(root / "gpt-oss", "gpt-oss"))
    return root


@pytest.fixture
def root(exported: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "models"))


def inspected(root: Path) -> ModelProfile:
    """What inspection says of the model."""
    (profile,) = inspect_models(root, DigestCache())
    return profile


def command(root: Path, layers: tuple[int, ...], *, vocabulary_on_disk: bool = False) -> Execute:
    """The prompts, planned as the service plans them, with no folder for extents of our own."""
    profile, config = inspected(root), RuntimeConfig()
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    order = make_command(root / "gpt-oss", rows, disk_layers=layers, vocabulary_on_disk=vocabulary_on_disk)
    found = plan("path:gpt-oss", [HeldModel(profile=profile, workers=("w",))], config).plan
    return replace(order, runtime_plan=found, profile=profile, config=config)


@pytest.mark.parametrize(("layers", "vocabulary_on_disk"), [(LAYERS, False), ((2,), False), (LAYERS, True)])
def test_layers_come_from_the_export(exported: Path, layers: tuple[int, ...], vocabulary_on_disk: bool) -> None:
    """Inspection finds it sound, the plan reads it, the tokens are those of transformers, and the bytes are counted."""
    assert (inspected(exported).has_gds_export, inspected(exported).gds_export_problem) == (True, None)
    order = command(exported, layers, vocabulary_on_disk=vocabulary_on_disk)
    assert GDS in order.runtime_plan.specialization_pass_ids
    messages = run(Engine(), order)
    found = {row: result.text for row, result in results_of(messages).items()}
    model = exported / "gpt-oss"
    assert found == {index: plain_greedy(model, prompt, NEW_TOKENS) for index, prompt in enumerate(PROMPTS)}
    outcome, measured = first_outcomes(messages)[GDS], only(messages, Finished).measured
    assert isinstance(outcome, Applied)
    seen = int(outcome.evidence.partition(" bytes read from gds_export, ")[0].replace(",", ""))
    a_pass = sum(open_export(model).extents[f"model.layers.{layer}"].size for layer in layers)
    assert NEW_TOKENS * a_pass <= seen <= measured["export_bytes_read"]  # the reader goes on reading ahead meanwhile


def test_the_export_is_not_needed_where_every_layer_is_in_memory(exported: Path) -> None:
    """Then the safetensors files are loaded, whatever is exported."""
    outcome = first_outcomes(run(Engine(), command(exported, ())))[GDS]
    assert outcome == NotNeeded(reason="every layer is in memory; the safetensors files were loaded")


def test_an_export_comes_back_bit_by_bit(exported: Path) -> None:
    """Every tensor of the model that transformers loads is in it, with its bits."""
    whole = generic.load(command(exported, ()), nothing).module
    streamed = generic.load(command(exported, (3,)), nothing).module
    held = dict(streamed.named_parameters())
    kept = {key: tensor for key, tensor in whole.named_parameters() if not key.startswith("model.layers.3.")}
    assert len(kept) > 20
    assert all(held[key].equal(tensor) for key, tensor in kept.items())


def failure(root: Path, layers: tuple[int, ...] = LAYERS) -> str:
    """Why the pass fails."""
    failed = only(run(Engine(), command(root, layers)), SpecializationFailed)
    outcome = failed.outcomes[GDS]
    assert isinstance(outcome, Failed)
    return outcome.reason


@pytest.mark.parametrize("where", ["resident", "streamed"])
def test_a_damaged_export_fails_the_pass_and_is_left_alone(root: Path, where: str) -> None:
    """A flipped bit in what stays, or in a layer that streams: no row is answered, and the user's files are not touched."""
    folder = root / "gpt-oss" / "gds_export"
    manifest = json.loads((folder / "manifest.json").read_text())
    name = "" if where == "resident" else "model.layers.3"
    flip_a_bit(folder, at=manifest[name]["offset"] + manifest[name]["tensors"][0][3])
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    reason = failure(root)
    assert "the export is damaged" in reason
    assert "export it anew" in reason
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == before


def test_an_export_of_other_weights_does_not_count(root: Path) -> None:
    """The model was trained on after it was exported: inspection says so, and no plan reads the export."""
    path = root / "gpt-oss" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, path, metadata={"format": "pt"})
    profile = inspected(root)
    assert not profile.has_gds_export
    assert "made of other weights" in (profile.gds_export_problem or "")


def test_an_export_of_another_shape_fails_the_pass(root: Path) -> None:
    """A manifest that was told the right digest, and holds a tensor that the model has otherwise."""
    change(root, lambda manifest: first_tensor(manifest).__setitem__(2, [int(first_tensor(manifest)[2][0]), 1]))
    assert "is not as the model has it" in failure(root)


def test_an_export_of_another_version_of_transformers_fails_the_pass(root: Path) -> None:
    """Names and layout depend on it; the message says what to do."""
    change(root, lambda manifest: manifest[""]["origin"].__setitem__("transformers", "4.0"))
    assert failure(root).startswith("the export was made by transformers 4.0, this worker has ")


def test_raw_tensors_that_are_no_extents_fail_the_pass(root: Path) -> None:
    """An export of another program may be planned with, and cannot be read."""
    folder = root / "gpt-oss" / "gds_export"
    (folder / "manifest.json").write_text(json.dumps({"a": {"path": "weights.extents", "dtype": "float16", "shape": [1]}}))
    assert inspected(root).has_gds_export
    assert "workers.runner.weights.export" in failure(root)


def first_tensor(manifest: Any) -> list[Any]:
    """The first tensor of the first extent with one dimension."""
    return next(tensor for entry in manifest.values() for tensor in entry["tensors"] if len(tensor[2]) == 1)


def change(root: Path, how: Callable[[Any], Any]) -> None:
    """Change the manifest."""
    path = root / "gpt-oss" / "gds_export" / "manifest.json"
    manifest = json.loads(path.read_text())
    how(manifest)
    path.write_text(json.dumps(manifest))


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "outside": lambda manifest: [entry.__setitem__("path", "../model.safetensors") for entry in manifest.values()],
    "absolute": lambda manifest: manifest[""].__setitem__("path", "/etc/passwd"),
    "pickle": lambda manifest: manifest[""].__setitem__("path", "weights.pt"),
    "missing": lambda manifest: manifest[""].__setitem__("path", "other.extents"),
    "negative offset": lambda manifest: manifest["model.layers.0"].__setitem__("offset", -4096),
    "beside a block": lambda manifest: manifest[""].__setitem__("offset", 8),
    "too long": lambda manifest: list(manifest.values())[-1].__setitem__("shape", [2**40]),
    "huge": lambda manifest: manifest[""].__setitem__("shape", [2**80]),
    "not following": lambda manifest: manifest["model.layers.1"].__setitem__("offset", 0),
    "no checksum": lambda manifest: manifest[""].pop("crc32"),
    "dtype": lambda manifest: first_tensor(manifest).__setitem__(1, "__class__"),
    "bytes": lambda manifest: first_tensor(manifest).__setitem__(4, 1),
    "beyond its extent": lambda manifest: first_tensor(manifest).__setitem__(3, 2**40),
    "shape": lambda manifest: first_tensor(manifest).__setitem__(2, [-1]),
    "true": lambda manifest: first_tensor(manifest).__setitem__(3, True),
    "tensors": lambda manifest: manifest["model.layers.2"].__setitem__("tensors", {"a": 1}),
    "slices out of order": lambda manifest: manifest["lm_head.weight/0"].__setitem__("first", 5),
    "a slice of nothing": lambda manifest: manifest["model.layers.2"].__setitem__("first", 0),
    "no origin": lambda manifest: manifest[""].pop("origin"),
    "format": lambda manifest: manifest[""]["origin"].__setitem__("format", "other"),
    "version": lambda manifest: manifest[""]["origin"].__setitem__("schema_version", 99),
    "digest": lambda manifest: manifest[""]["origin"].__setitem__("digest", "no digest"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_inspection_and_runner_refuse_the_same(root: Path, what: str) -> None:
    """Whatever is wrong with a manifest, inspection gives the reason, and a runner that is told to read it fails the pass."""
    change(root, HOSTILE[what])
    profile = inspected(root)
    assert profile.is_usable
    assert not profile.has_gds_export
    assert profile.gds_export_problem
    with pytest.raises(PassFailed):
        open_export(root / "gpt-oss")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"": 1}', "{}"])
def test_a_manifest_that_is_none_fails_the_pass(root: Path, text: str) -> None:
    """Not JSON, or no object of objects."""
    (root / "gpt-oss" / "gds_export" / "manifest.json").write_text(text)
    with pytest.raises(PassFailed):
        open_export(root / "gpt-oss")


def test_a_link_out_of_the_model_is_no_file_of_the_export(root: Path, tmp_path: Path) -> None:
    """Where the extents are a link to another place, nothing is read from there."""
    data = root / "gpt-oss" / "gds_export" / "weights.extents"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PassFailed, match="is missing"):
        open_export(root / "gpt-oss")


def test_the_command_exports_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says where and how much; again, and for a folder that is no model, it says why not; nothing unfinished stays."""
    model = save_model(tmp_path / "model", "gpt-oss")
    assert main([str(model)]) == 0
    assert capsys.readouterr().out.startswith(f"{model / 'gds_export'}: ")
    assert {path.name for path in (model / "gds_export").iterdir()} == {"weights.extents", "manifest.json"}
    assert not list(model.glob(".gds*"))
    assert main([str(model)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "not exported" in capsys.readouterr().err


def test_an_export_that_broke_off_is_gone_on_with(tmp_path: Path) -> None:
    """Another export of the same weights finds what is there, and ends as one that was never interrupted."""
    model = save_model(tmp_path / "model", "gpt-oss")
    calls: list[None] = []

    def break_off() -> None:
        calls.append(None)
        if len(calls) > 40:
            raise OSError("pulled plug")

    with pytest.raises(OSError, match="pulled plug"):
        export_model(model, break_off)
    assert not (model / "gds_export").exists()
    folder = export_model(model)
    other = export_model(Path(shutil.copytree(model, tmp_path / "other", ignore=shutil.ignore_patterns("gds_export"))))
    for name in ("weights.extents", "manifest.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
