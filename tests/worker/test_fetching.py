"""Does a model come from the hub whole, or not at all, whatever breaks? The downloading process against a hub on loopback."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ollm_service.inspection import DigestCache, inspect_models
from tests.doubles.hub import Hub
from tests.unit.model_folders import TENSORS, TINY_LLAMA, make_model, safetensors_bytes
from tests.waiting import wait_for
from workers.download.staging import MARK, STAGING
from workers.downloads import download_environment

REPOSITORY = Path(__file__).parents[2]
SECRET = "hf_very_secret_token"
CHUNK_BYTES = 10 * 1024**2  # what the hub's library has in hand before it writes
LARGE = {**TENSORS, "model.layers.0.mlp.up_proj.weight": ("F32", (4, CHUNK_BYTES // 4))}  # four of those


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub without repositories."""
    with Hub() as started:
        yield started


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a model that the hub may offer."""
    return make_model(tmp_path / "source", tensors=LARGE)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A models root with nothing in it."""
    made = tmp_path / "models"
    made.mkdir()
    return made


def start(hub: Hub, root: Path, *, token: str | None = None, **wanted: Any) -> "subprocess.Popen[str]":
    """The process that fetches `org/name`."""
    given = {"repo_id": "org/name", "revision": None, "root": str(root), "folder": "org--name", **wanted}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_ENDPOINT": hub.url, "HF_HOME": str(root.parent / "home")}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.Popen(
        [sys.executable, "-m", "workers.download", json.dumps(given)],
        env=download_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: "subprocess.Popen[str]") -> Mapping[str, Any]:
    """What it says last."""
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert SECRET not in printed + told
    last: Mapping[str, Any] = json.loads(printed.splitlines()[-1])
    return last


def fetch(hub: Hub, root: Path, **about: Any) -> Mapping[str, Any]:
    """Fetch `org/name` and return how that ended."""
    return end_of(start(hub, root, **about))


def test_only_what_is_allowed_is_fetched(hub: Hub, source: Path, root: Path) -> None:
    """No pickle, no code, no second copy of the weights, no picture; what is fetched is a usable model with the hub's bytes."""
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors", "original/x.safetensors", ".env"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"x" * 100)
    (source / "gds_export").mkdir()
    (source / "gds_export" / "a.raw").write_bytes(b"raw")
    (source / "gds_export" / "a.pt").write_bytes(b"pickled")
    hub.add("org/name", source)
    assert fetch(hub, root) == {"event": "done"}
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "gds_export/a.raw"}
    assert set(hub.asked) == wanted
    there = {path.relative_to(root / "org--name").as_posix() for path in (root / "org--name").rglob("*") if path.is_file()}
    assert there == wanted | {MARK}
    assert (root / "org--name" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    (profile,) = inspect_models(root, DigestCache())
    assert (profile.name, profile.unsafe_because) == ("org--name", None)
    before = sum(hub.asked.values())
    assert fetch(hub, root) == {"event": "done"}
    assert sum(hub.asked.values()) == before


def test_a_connection_that_is_cut_is_gone_on_with(hub: Hub, source: Path, root: Path) -> None:
    """In the middle, twice: what is on the disk is not fetched again."""
    hub.add("org/name", source)
    size = (source / "model.safetensors").stat().st_size
    hub.cuts = [CHUNK_BYTES * 3 // 2] * 2
    assert fetch(hub, root) == {"event": "done"}
    assert hub.ranges == [("model.safetensors", CHUNK_BYTES), ("model.safetensors", 2 * CHUNK_BYTES)]
    assert hub.served["model.safetensors"] == size + 2 * (CHUNK_BYTES // 2)  # what was in hand when it was cut
    assert (root / "org--name" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_process_that_is_killed_is_gone_on_with(hub: Hub, source: Path, root: Path) -> None:
    """By SIGKILL in the middle: nothing is on offer then, and the next one asks for the rest alone."""
    hub.add("org/name", source)
    hub.held = {"model.safetensors"}
    process = start(hub, root)
    assert hub.is_held.wait(60)
    part = root / STAGING / "org--name" / "parts" / "model.safetensors"
    wait_for(lambda: part.is_file() and part.stat().st_size > 0, timeout=30, what="a part on the disk")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    have = part.stat().st_size
    assert inspect_models(root, DigestCache()) == ()
    hub.go_on.set()
    hub.held = set()
    assert fetch(hub, root) == {"event": "done"}
    assert hub.ranges == [("model.safetensors", have)]
    assert [profile.unsafe_because for profile in inspect_models(root, DigestCache())] == [None]
    assert list((root / STAGING).iterdir()) == [root / STAGING / "org--name.lock"]


def test_two_processes_do_not_fetch_the_same(hub: Hub, source: Path, root: Path) -> None:
    """The second one says so and leaves everything to the first."""
    hub.add("org/name", source)
    hub.held = {"model.safetensors"}
    first = start(hub, root)
    assert hub.is_held.wait(60)
    assert fetch(hub, root)["event"] == "busy"
    hub.go_on.set()
    assert end_of(first) == {"event": "done"}


def test_a_gated_repository_needs_a_token_of_this_machine(hub: Hub, source: Path, root: Path) -> None:
    """Without one the reason says where to set it; with it the model comes, and nobody is told the token but the hub."""
    hub.add("org/name", source, token=SECRET)
    refused = fetch(hub, root)
    assert (refused["event"], refused["code"], refused["is_permanent"], refused["is_everywhere"]) == (
        "failed",
        "gated",
        True,
        False,
    )
    assert "set HF_TOKEN on the worker" in refused["message"]
    assert fetch(hub, root, token=SECRET) == {"event": "done"}
    assert hub.tokens == {SECRET}
    assert not any(SECRET.encode() in path.read_bytes() for path in root.rglob("*") if path.is_file())


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(hub: Hub, source: Path, root: Path) -> None:
    """In bytes."""
    hub.add("org/name", source, sizes={"model.safetensors": 10**17})
    failed = fetch(hub, root)
    assert (failed["code"], failed["is_permanent"], failed["is_everywhere"]) == ("disk_too_small", True, False)
    assert "org/name needs 100,000,000," in failed["message"]
    assert hub.asked == {}


@pytest.mark.parametrize(
    ("wanted", "code", "is_everywhere", "message"),
    [
        ({"repo_id": "org/nothing"}, "no_such_repository", False, "there is no org/nothing at http://127.0.0.1"),
        ({"revision": "v9"}, "no_such_revision", True, "org/name has no revision v9"),
    ],
)
def test_what_the_hub_does_not_have_is_told(
    hub: Hub, source: Path, root: Path, wanted: Mapping[str, Any], code: str, is_everywhere: bool, message: str
) -> None:
    """Clearly and at once."""
    hub.add("org/name", source)
    failed = fetch(hub, root, **wanted)
    assert (failed["code"], failed["is_permanent"], failed["is_everywhere"]) == (code, True, is_everywhere)
    assert message in failed["message"]


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _with_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _with_a_shard_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../other.safetensors"}}))


def _with_pickles_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without_processor(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, "vision_config": {"hidden_size": 8}}))


def _with_an_empty_shard(folder: Path) -> None:
    _with_a_missing_shard(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_tokenizer, "org/name lacks a tokenizer"),
        (_with_a_missing_shard, "org/name lacks the shard model-00002-of-00002.safetensors"),
        (_with_a_shard_outside, "which is not a safetensors file in this folder"),
        (_with_pickles_alone, "org/name has no safetensors weights"),
        (_without_processor, "lacks a processor, which its vision_config asks for"),
        (_with_an_empty_shard, "org/name lacks the shard model-00002-of-00002.safetensors"),
    ],
)
def test_what_is_not_whole_at_the_hub_fails_before_its_weights_are_fetched(
    hub: Hub, source: Path, root: Path, spoil: Any, message: str
) -> None:
    """It is looked at twice, and never on offer."""
    spoil(source)
    hub.add("org/name", source)
    failed = fetch(hub, root)
    assert (failed["event"], failed["is_permanent"], failed["is_everywhere"]) == ("failed", True, True)
    assert message in failed["message"]
    assert not any(file.endswith((".safetensors", ".bin")) for file in hub.asked)
    assert hub.asked["config.json"] in (0, 2)
    assert inspect_models(root, DigestCache()) == ()


def test_what_is_damaged_on_the_disk_is_fetched_anew(hub: Hub, source: Path, root: Path) -> None:
    """A part with other content is told by its sha256, and dropped."""
    hub.add("org/name", source)
    hub.held = {"model.safetensors"}
    process = start(hub, root)
    assert hub.is_held.wait(60)
    process.kill()
    process.communicate()
    part = root / STAGING / "org--name" / "parts" / "model.safetensors"
    part.write_bytes(b"\xff" * 5_000)
    hub.go_on.set()
    hub.held = set()
    assert fetch(hub, root) == {"event": "done"}
    assert (root / "org--name" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_newer_commit_begins_anew(hub: Hub, source: Path, root: Path) -> None:
    """What lies there of another commit is not mixed with it."""
    hub.add("org/name", source)
    hub.held = {"model.safetensors"}
    process = start(hub, root)
    assert hub.is_held.wait(60)
    process.kill()
    process.communicate()
    hub.go_on.set()
    hub.held = set()
    (source / "model.safetensors").write_bytes(safetensors_bytes({**LARGE, "lm_head.weight": ("F32", (64, 16))}))
    (source / "generation_config.json").write_text("{}")  # another file list, hence another commit
    assert fetch(hub, root) == {"event": "done"}
    assert hub.ranges == []
    assert (root / "org--name" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("place", ["org--name", f"{STAGING}/org--name"])
def test_a_folder_of_somebody_else_is_left_alone(hub: Hub, source: Path, root: Path, place: str) -> None:
    """One without our mark is in the way: nothing in it is deleted or changed."""
    hub.add("org/name", source)
    theirs = root / place / "mine.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    failed = fetch(hub, root)
    assert (failed["code"], failed["is_permanent"]) == ("folder_in_the_way", True)
    assert [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"] == [theirs]
    assert theirs.read_text() == "precious"


def test_what_we_made_and_somebody_spoilt_is_mended(hub: Hub, source: Path, root: Path) -> None:
    """Only what is missing is fetched."""
    hub.add("org/name", source)
    assert fetch(hub, root) == {"event": "done"}
    (root / "org--name" / "tokenizer.json").unlink()
    hub.asked.clear()
    assert fetch(hub, root) == {"event": "done"}
    assert hub.asked == {"tokenizer.json": 1}


@pytest.mark.parametrize("folder", ["../out", ".hidden", "a/b", ""])
def test_no_folder_outside_the_models_root_is_written_to(hub: Hub, source: Path, root: Path, folder: str) -> None:
    """Whatever is asked of the process."""
    hub.add("org/name", source)
    assert fetch(hub, root, folder=folder)["event"] == "failed"
    assert list(root.iterdir()) == []


def test_the_process_sees_no_setting_of_ours() -> None:
    """No database password goes to the hub's library, and what would keep it from the hub is not handed on."""
    seen = download_environment({"OLLM_DATABASE_URL": "x", "HF_HUB_OFFLINE": "1", "HF_TOKEN": SECRET, "HF_ENDPOINT": "y"})
    assert {"HF_TOKEN", "HF_ENDPOINT"} <= seen.keys()
    assert not {"OLLM_DATABASE_URL", "HF_HUB_OFFLINE"} & seen.keys()
