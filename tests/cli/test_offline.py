"""Does `preview --models-dir` plan without a service what the service would, with the same exit codes?"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ollm_service.coordinator.service import Service
from ollm_service.core.plan import RuntimePlan
from ollm_service.inspection import DigestCache, inspect_models
from tests.cli.conftest import Command, run_here, run_process
from tests.servers import refused_port
from tests.store.samples import new_worker
from tests.unit.model_folders import TINY_LLAMA, make_hub_snapshot, make_model

OTHER: dict[str, Any] = {**TINY_LLAMA, "architectures": ["PhiForCausalLM"], "model_type": "phi"}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder, and nothing kept outside the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_model(tmp_path / "models" / "tiny")
    make_model(tmp_path / "models" / "other", config=OTHER)
    unsafe = make_model(tmp_path / "models" / "pickled")
    (unsafe / "training.bin").write_bytes(b"")
    return tmp_path / "models"


@pytest.fixture
def offline(models: Path, tmp_path: Path) -> Command:
    """The command, with nobody at the address where the service should be."""
    return functools.partial(run_here, base_url=f"http://127.0.0.1:{refused_port()}", folder=tmp_path)


def test_the_same_object_as_the_service_gives(
    command: Command, offline: Command, models: Path, service: Service, tmp_path: Path
) -> None:
    """Key by key, apart from the name of the preview and from who could run it, which only a service knows."""
    found = tuple(profile for profile in inspect_models(models, DigestCache()) if profile.is_usable)
    new_worker(service.store, "attic", models=found)
    for model, options in (("tiny", ["--kv-cache-strategy", "paged"]), ("other", ["--where", 'zone == "home"'])):
        there = json.loads(command("preview", model, *options, "--json").stdout)
        here = json.loads(offline("preview", model, *options, "--models-dir", str(models), "--json").stdout)
        assert here.keys() == there.keys()
        for name in here.keys() - {"id", "workers", "condition"}:
            assert here[name] == there[name], name
        assert (here["workers"], here["placement"], here["quote"]) == ([], None, None)


def test_it_runs_as_a_process_of_its_own(models: Path, tmp_path: Path) -> None:
    """With no service anywhere, and the plan in words."""
    done = run_process(
        "preview", "path:tiny", "--models-dir", "models", base_url=f"http://127.0.0.1:{refused_port()}", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "optimized-native" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("tiny", "--backend", "magic"), 2, "optimized-native"),
        (("tiny", "--where", "zone = 1"), 2, "label expression"),
        (("../tiny",), 2, "inside the models root"),
        (("path:/etc",), 2, "inside the models root"),
        (("a//b",), 2, "repository id"),
        ((" ",), 2, "empty"),
        (("tiny", "-m", "tiny", "--rows", "rows.jsonl"), 2, "leave out FILE"),
        (("tiny", "--if", "h200"), 2, "leave out FILE and --if"),
        (("nobody-has-this",), 2, "In it: other, pickled, tiny."),
        (("pickled",), 3, "pickle"),
        (("other", "--backend", "optimized-native"), 3, "optimized-native"),
    ],
)
def test_exit_codes(offline: Command, tmp_path: Path, arguments: tuple[str, ...], code: int, told: str) -> None:
    """2 for an option or a reference, 3 where nothing could run it, each with its reason."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    done = offline("preview", *arguments, "--models-dir", "models")
    assert done.returncode == code, done.stderr
    assert told in done.stdout + done.stderr


@pytest.mark.parametrize("reference", ["../tiny", "path:/etc", "~/tiny", "a//b", "hf:", "x@", " ", "a" * 10_000])
def test_references_exit_alike_with_a_service_and_without(command: Command, offline: Command, reference: str) -> None:
    """Malformed, or out of the models roots: 2 from both verbs and in both ways, and nothing is asked of a worker."""
    codes = {
        command("preview", reference).returncode,
        command("submit", "-", "-m", reference, given=b'{"prompt": "a"}\n').returncode,
        offline("preview", reference, "--models-dir", "models").returncode,
    }
    assert codes == {2}


def test_the_weights_of_other_models_are_not_read(offline: Command, models: Path, tmp_path: Path) -> None:
    """Only the folder that is named is inspected, under whichever of its names; digests are kept of what was read as a whole."""
    hub = make_hub_snapshot(models, "org/name", "a" * 40, refs=("main",))
    (models / "llama3-1B-chat").symlink_to(models / "tiny")

    def read_after(reference: str) -> set[Path]:
        done = offline("preview", reference, "--models-dir", "models", "--json")
        assert json.loads(done.stdout)["resolved_model"]["digest"], done.stderr
        known = json.loads((tmp_path / "cache" / "ollm-service" / "digests.json").read_text())
        return {Path(json.loads(key)[0]).parent for key in known}

    tiny, blobs = (models / "tiny").resolve(), (hub.parents[1] / "blobs").resolve()
    for reference in ("tiny", "path:tiny", "./tiny", "llama3-1B-chat"):
        assert read_after(reference) == {tiny}
    for reference in ("hf:org/name", "org/name@main", "org--name"):
        assert read_after(reference) == {tiny, blobs}


def test_a_plan_that_nothing_can_run_is_printed(offline: Command) -> None:
    """Whole, for a program to read, and without requirements."""
    done = offline("preview", "other", "--backend", "optimized-native", "--models-dir", "models", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 3
    assert found["plan"]["backend_id"] is None
    assert found["plan"].keys() >= set(RuntimePlan.__dataclass_fields__) - {"resolved_model"}
    assert (found["requirements"], found["class_id"], found["executable"]) == (None, None, False)


def test_options_of_this_machine_count(offline: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would in a submission from here; a flag wins over them."""
    (tmp_path / "ollm.toml").write_text("[runtime]\nuse_specialization = false")
    look = ("preview", "tiny", "--models-dir", "models", "--json")
    assert json.loads(offline(*look).stdout)["plan"]["backend_id"] == "transformers-generic"
    assert json.loads(offline(*look, "--use-specialization").stdout)["plan"]["backend_id"] == "optimized-native"
    monkeypatch.setenv("OLLM_RUNTIME__MAGIC", "1")
    wrong = offline(*look)
    assert wrong.returncode == 2
    assert "OLLM_RUNTIME__MAGIC is not an option" in wrong.stderr


def test_a_folder_that_is_not_there_is_a_bad_option(offline: Command, models: Path) -> None:
    """A slip of the pen is not an empty fleet; an alias needs no folder of its own."""
    missing = offline("preview", "tiny", "--models-dir", "modles")
    assert (missing.returncode, "modles is not a folder" in missing.stderr) == (2, True)
    shutil.rmtree(models / "tiny")
    alias = json.loads(offline("preview", "llama3-1B-chat", "--models-dir", "models", "--json").stdout)
    assert alias["requirements"]["download"] == alias["resolved_model"]["repo_id"]
