"""Is a models root read right, and is nothing in it trusted?"""

import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from transformers.models.auto import modeling_auto

from ollm_service.core.architectures import NATIVE_ARCHITECTURES
from ollm_service.core.errors import MisconfiguredService
from ollm_service.core.plan import GenericModelKind, ModelModality, NativeFamily
from ollm_service.core.profile import ModelProfile
from ollm_service.inspection import DigestCache, InspectionStopped, each_model, inspect_models
from tests.unit.model_folders import (
    TENSORS,
    TINY_LLAMA,
    framed,
    make_hub_snapshot,
    make_model,
    make_sharded_model,
    safetensors_bytes,
)

Breaker = Callable[[Path], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty models root."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def inspect_one(root: Path) -> ModelProfile:
    """The only model of a root."""
    (profile,) = inspect_models(root, DigestCache())
    return profile


# ---------------------------------------------------------------------------------------- facts


def test_facts_come_from_configuration_and_headers(root: Path) -> None:
    """A hand-made Llama yields every fact that planning and placement go by."""
    make_model(root / "tiny", tokenizer_config={"chat_template": "{{ messages }}"})
    profile = inspect_one(root)
    assert profile.unsafe_because is None
    assert (profile.name, profile.path) == ("tiny", PurePosixPath("tiny"))
    assert (profile.architecture, profile.model_type, profile.family) == ("LlamaForCausalLM", "llama", NativeFamily.LLAMA)
    assert (profile.kind, profile.modalities) == (GenericModelKind.CAUSAL_LM, (ModelModality.TEXT,))
    assert (profile.layer_count, profile.hidden_size, profile.intermediate_size) == (2, 16, 32)
    assert (profile.vocabulary_size, profile.attention_heads, profile.max_context_tokens) == (64, 4, 128)
    assert profile.parameter_count == 64 * 16 + 16
    assert profile.weight_bytes == 4 * profile.parameter_count
    assert profile.kv_bytes_per_token == 2 * 2 * 2 * 4 * 4
    assert profile.has_chat_template
    assert len(profile.digest) == 64


def test_a_sharded_model_is_the_sum_of_its_shards(root: Path) -> None:
    """Parameters are counted over every shard that the index names."""
    make_sharded_model(root / "sharded")
    profile = inspect_one(root)
    assert profile.unsafe_because is None
    assert profile.parameter_count == 64 * 16 + 16


def test_a_chat_template_may_be_a_file_of_its_own(root: Path) -> None:
    """`chat_template.jinja` counts like the entry in the tokenizer's configuration."""
    make_model(root / "tiny")
    assert not inspect_one(root).has_chat_template
    (root / "tiny" / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect_one(root).has_chat_template


def test_native_architectures_are_those_of_the_installed_transformers() -> None:
    """The list of architectures that need no remote code equals what transformers' own mappings name."""
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    named: set[str] = set()
    for mapping in mappings:
        names: Any
        for names in mapping.values():
            named |= {names} if isinstance(names, str) else set(names)
    assert named == NATIVE_ARCHITECTURES


# ---------------------------------------------------------------------------------------- what is refused, and why


def add(name: str, content: bytes = b"x") -> Breaker:
    """Put one more file into the folder."""

    def breaker(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return breaker


def configured(**changes: object) -> Breaker:
    """Change the model's configuration."""
    return add("config.json", json.dumps({**TINY_LLAMA, **changes}).encode())


def header(entries: object, data: bytes = b"") -> Breaker:
    """Give the weight file this header."""
    return add("model.safetensors", framed(json.dumps(entries).encode(), data))


def tensor(dtype: object = "F32", shape: object = (1,), span: object = (0, 4)) -> dict[str, object]:
    """One header with one tensor."""
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": span}}


def remove(name: str) -> Breaker:
    """Take a file away."""
    return lambda folder: (folder / name).unlink()


def link(name: str, target: str) -> Breaker:
    """Put a link into the folder."""
    return lambda folder: (folder / name).symlink_to(target)


def pipe(name: str) -> Breaker:
    """Put a named pipe in a file's place: opening it would wait for ever."""

    def breaker(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return breaker


def listen(folder: Path) -> None:
    """Leave a socket file behind."""
    here = Path.cwd()
    os.chdir(folder)  # a socket's path has a length limit that temporary folders exceed
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
    finally:
        os.chdir(here)


def turn_into_an_adapter(folder: Path) -> None:
    """Leave what peft saves: no model's configuration, but the name of one."""
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("breaker", "reason"),
    [
        *((add(f"weights{suffix}"), "pickle") for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".BIN")),
        (add("deep/er/training_args.bin"), "deep/er/training_args.bin may hold a pickle"),
        (link("notes.txt", "/etc/hostname"), "notes.txt is a link that leaves"),
        (link("notes.txt", "../../outside"), "notes.txt is a link that leaves"),
        (link("elsewhere", "/etc"), "elsewhere is a link that leaves"),
        (link("loop", "loop"), "loop"),
        (link("self", "."), "self"),
        (link("gone", "nowhere"), "gone is not a plain file"),
        (pipe("pipe"), "pipe is not a plain file"),
        (pipe("config.json"), "config.json is not a plain file"),
        (listen, "socket is not a plain file"),
        (remove("config.json"), "no config.json"),
        (add("config.json", b"{"), "config.json is not JSON"),
        (add("config.json", b"\xff\xfe{}"), "config.json is not JSON"),
        (add("config.json", b"[]"), "config.json is not a JSON object"),
        (add("config.json", b"[" * 200_000), "config.json is not JSON"),
        (add("config.json", b" " * (4 * 1024**2 + 1)), "config.json is larger than"),
        (remove("model.safetensors"), "neither model.safetensors nor"),
        (remove("tokenizer.json"), "no tokenizer"),
        (add("model.safetensors", b""), "cut short"),
        (add("model.safetensors", b"\1\0\0"), "cut short"),
        (add("model.safetensors", (2**63).to_bytes(8, "little")), "cut short"),
        (add("model.safetensors", framed(b"{}", b"left over")), "holds 9 bytes of tensors, its header says 0"),
        (add("model.safetensors", framed(b"[" * 100_000)), "is not JSON"),
        (add("model.safetensors", safetensors_bytes()[:-1]), "holds 4,159 bytes of tensors, its header says 4,160"),
        (add("other.safetensors", framed(b"[]")), "the header of other.safetensors is not a JSON object"),
        (header({"w": 1}), "malformed"),
        (header(tensor(dtype="F33")), "malformed"),
        (header(tensor(dtype=["F32"])), "malformed"),
        (header(tensor(shape=(-1,))), "malformed"),
        (header(tensor(shape=(True,))), "malformed"),
        (header(tensor(shape=(1,) * 17)), "malformed"),
        (header(tensor(shape=(2**62, 2**62))), "malformed"),
        (header(tensor(span=(0,), shape=())), "malformed"),
        (header(tensor(span=(), shape=())), "malformed"),
        (header(tensor(span=(0, 5))), "malformed"),
        (header(tensor(span=(4, 0))), "malformed"),
        (header(tensor(span=(2**60, 2**60 + 4))), "overlap or leave a gap"),
        (header({**tensor(), "v": tensor()["w"]}, b"\0" * 4), "overlap or leave a gap"),
        (header(tensor(), b""), "holds 0 bytes of tensors, its header says 4"),
        (configured(auto_map={"AutoModel": "evil.Model"}, architectures=["EvilForCausalLM"]), "needs remote code"),
        (configured(auto_map={"AutoModel": "evil.Model"}, architectures=[]), "needs remote code"),
        (configured(quantization_config={"quant_method": "fp8"}), "quantized (fp8), which this version does not load"),
        (configured(quantization_config={"bits": 4}), "quantized (in a way that has no name)"),
        (configured(text_config={**TINY_LLAMA, "quantization_config": {"quant_method": "awq"}}), "its weights are quantized"),
        (add("adapter_config.json", b'{"base_model_name_or_path": "/elsewhere"}'), "holds an adapter"),
        (add("Adapter_Config.json", b""), "holds an adapter"),
        (turn_into_an_adapter, "merge the adapter into the model"),
    ],
)
def test_an_unsafe_or_broken_folder_is_reported_with_its_reason(root: Path, breaker: Breaker, reason: str) -> None:
    """One thing wrong anywhere in the folder makes the whole of it unusable, and says which."""
    breaker(make_model(root / "model"))
    profile = inspect_one(root)
    assert not profile.is_usable
    assert reason in (profile.unsafe_because or "")
    assert profile.digest == ""


@pytest.mark.parametrize(
    ("shards", "reason"),
    [
        ({"w": "../escape.safetensors"}, "not a safetensors file in this folder"),
        ({"w": "/etc/shard.safetensors"}, "not a safetensors file in this folder"),
        ({"w": "a\\..\\b.safetensors"}, "not a safetensors file in this folder"),
        ({"w": "model.pkl"}, "not a safetensors file in this folder"),
        ({"w": 7}, "not a safetensors file in this folder"),
        ({"w": "model-00003-of-00003.safetensors"}, "shard model-00003-of-00003.safetensors is missing"),
        ({"w": "model-00001-of-00002.safetensors"}, "lacks the tensor 'w'"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_an_index_must_lead_to_whole_shards_in_the_folder(root: Path, shards: object, reason: str) -> None:
    """Every shard that the index names is there, inside, and holds what it should."""
    folder = make_sharded_model(root / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert reason in (inspect_one(root).unsafe_because or "")


def test_a_tokenizer_that_is_a_program_is_refused(root: Path) -> None:
    """A tokenizer that only its own code could load makes the folder unusable."""
    folder = make_model(root / "model", tokenizer_config={"auto_map": {"AutoTokenizer": "evil.Tokenizer"}})
    assert inspect_one(root).is_usable
    (folder / "tokenizer.json").rename(folder / "vocab.txt")
    assert "remote code" in (inspect_one(root).unsafe_because or "")


def test_code_that_comes_along_is_ignored_where_transformers_has_its_own(root: Path) -> None:
    """An `auto_map` beside a native architecture does no harm: remote code stays off."""
    make_model(root / "model", {**TINY_LLAMA, "auto_map": {"AutoModel": "theirs.Model"}})
    assert inspect_one(root).is_usable


def test_an_adapter_in_a_subfolder_is_nobodys_business(root: Path) -> None:
    """Nothing looks for one there."""
    add("original/adapter_config.json", b"{}")(make_model(root / "model"))
    assert inspect_one(root).is_usable


def test_an_unreadable_file_is_a_reason_not_a_crash(root: Path) -> None:
    """A path that the system refuses makes the folder unusable, and the others are still read."""
    make_model(root / "good")
    (make_model(root / "odd") / ("n" * 200)).symlink_to("m" * 300)
    bad, good = sorted(inspect_models(root, DigestCache()), key=lambda profile: profile.is_usable)
    assert good.is_usable
    assert bad.unsafe_because


def test_a_folder_with_too_many_files_is_refused(root: Path) -> None:
    """The walk through a folder is bounded."""
    folder = make_model(root / "model")
    for number in range(10_000):
        (folder / str(number)).touch()
    assert "10,000 files" in (inspect_one(root).unsafe_because or "")


def test_headers_are_bounded_one_by_one_and_together(root: Path) -> None:
    """Neither one huge header nor many large ones are read."""
    folder = make_model(root / "model")
    with (folder / "huge.safetensors").open("wb") as file:
        file.write((16 * 1024**2 + 1).to_bytes(8, "little"))
        file.truncate(20 * 1024**2)
    assert "huge.safetensors has a header of 16,777,217 bytes" in (inspect_one(root).unsafe_because or "")
    (folder / "huge.safetensors").unlink()
    padded = framed(b"{}" + b" " * (15 * 1024**2))
    for number in range(5):
        (folder / f"{number}.safetensors").write_bytes(padded)
    assert "headers together" in (inspect_one(root).unsafe_because or "")


def test_an_odd_name_is_shown_escaped_and_refused(root: Path) -> None:
    """A folder whose name is not plain text is reported in a form that any database can hold."""
    make_model(root / "mo\ndel")
    make_model(Path(os.fsdecode(os.fsencode(root) + b"/bad\xff")))
    profiles = inspect_models(root, DigestCache())
    assert [profile.name for profile in profiles] == ["bad\\udcff", "mo\\ndel"]
    assert not any(profile.is_usable for profile in profiles)


# ---------------------------------------------------------------------------------------- the root and the hub cache


def test_only_folders_of_the_root_are_models(root: Path) -> None:
    """Files, hidden folders and other hub caches are passed over; a missing root holds nothing."""
    make_model(root / "model")
    make_model(root / ".hidden")
    make_model(root / "datasets--org--data")
    (root / "README.md").write_text("hello")
    (root / "dangling").symlink_to("nowhere")
    assert [profile.name for profile in inspect_models(root, DigestCache())] == ["model"]
    assert inspect_models(root / "missing", DigestCache()) == ()


def test_a_root_that_is_no_folder_is_a_misconfiguration(root: Path) -> None:
    """A models root that cannot be listed is said to the operator in one sentence."""
    (root / "file").write_text("x")
    with pytest.raises(MisconfiguredService, match="cannot be read"):
        inspect_models(root / "file", DigestCache())


def test_a_linked_model_folder_must_stay_in_the_root(root: Path, tmp_path: Path) -> None:
    """A link to a folder of the root is another name for it; a link out of the root is refused."""
    make_model(root / "inside")
    make_model(tmp_path / "outside")
    (root / "link-in").symlink_to("inside")
    (root / "link-out").symlink_to(tmp_path / "outside")
    (root / "link-self").symlink_to(".")
    found = {profile.name: profile for profile in inspect_models(root, DigestCache())}
    assert found["link-in"].digest == found["inside"].digest
    assert "leaves the models folder" in (found["link-out"].unsafe_because or "")
    assert not found["link-self"].is_usable


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    """An operator may link the models root to wherever the disk is."""
    make_model(root / "model")
    (tmp_path / "link").symlink_to(root)
    assert [profile.is_usable for profile in inspect_models(tmp_path / "link", DigestCache())] == [True]


def test_hub_snapshots_are_models_whose_links_may_lead_to_their_blobs(root: Path) -> None:
    """A snapshot of the hub cache is usable, knows its repository, its revision and the branches that name it."""
    make_hub_snapshot(root, "org/my--model", "abc123", refs=("main", "pr/1"))
    profile = inspect_one(root)
    assert profile.unsafe_because is None
    assert (profile.name, profile.path) == ("org--my--model", PurePosixPath("models--org--my--model/snapshots/abc123"))
    assert (profile.repo_id, profile.revision, profile.refs) == ("org/my--model", "abc123", ("main", "pr/1"))


def test_the_main_snapshot_bears_the_plain_name(root: Path) -> None:
    """Of several snapshots the one of `main` has the repository's name, the others add their revision."""
    make_hub_snapshot(root, "org/model", "old")
    make_hub_snapshot(root, "org/model", "new", refs=("main",))
    assert [profile.name for profile in inspect_models(root, DigestCache())] == ["org--model", "org--model--old"]


def test_a_snapshot_may_not_link_to_anything_but_its_own_blobs(root: Path) -> None:
    """A link from a snapshot to another folder of the root is refused all the same."""
    snapshot = make_hub_snapshot(root, "org/model", "abc")
    other = make_model(root / "other")
    (snapshot / "extra.json").symlink_to(other / "config.json")
    refused = next(profile for profile in inspect_models(root, DigestCache()) if profile.repo_id)
    assert "extra.json is a link that leaves" in (refused.unsafe_because or "")


def test_an_empty_or_hostile_hub_repository_yields_nothing_and_hangs_nothing(root: Path) -> None:
    """A repository without snapshots has no models; a pipe among its branches is not waited for."""
    (root / "models--org--empty").mkdir()
    make_hub_snapshot(root, "org/model", "abc")
    (root / "models--org--model" / "refs").mkdir()
    os.mkfifo(root / "models--org--model" / "refs" / "main")
    assert inspect_one(root).refs == ()


# ---------------------------------------------------------------------------------------- digests


def test_what_decides_an_answer_decides_the_digest(root: Path) -> None:
    """Equal files have equal digests; another weight, tokenizer, template or configuration has another; a README has not."""
    make_model(root / "a")
    make_model(root / "b")
    (root / "b" / "README.md").write_text("hello")
    first, second = inspect_models(root, DigestCache())
    assert first.digest == second.digest
    seen = {first.digest}
    weights = (root / "b" / "model.safetensors").read_bytes()
    for name, content in {
        "model.safetensors": weights[:-1] + b"\1",
        "tokenizer.json": b'{"other": 1}',
        "chat_template.jinja": b"{{ messages }}",
        "config.json": json.dumps({**TINY_LLAMA, "rope_theta": 7}).encode(),
    }.items():
        (root / "b" / name).write_bytes(content)
        seen.add(inspect_models(root, DigestCache())[1].digest)
    assert len(seen) == 5


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    """The cache answers by path, inode, size and modification time, in this process and the next."""
    file, store = tmp_path / "weights", tmp_path / "data" / "digests.json"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    cache = DigestCache(store)
    assert cache.digest(file) == hashlib.sha256(b"one").hexdigest()
    cache.save()
    with file.open("r+b") as same_inode:
        same_inode.write(b"two")
    os.utime(file, ns=(1, 1))
    assert DigestCache(store).digest(file) == hashlib.sha256(b"one").hexdigest()
    os.utime(file, ns=(2, 2))
    assert DigestCache(store).digest(file) == hashlib.sha256(b"two").hexdigest()


def test_processes_that_share_a_cache_file_add_to_it(tmp_path: Path) -> None:
    """A save keeps what another process has stored meanwhile and drops files that are gone."""
    store = tmp_path / "digests.json"
    one, two, gone = (tmp_path / name for name in ("one", "two", "gone"))
    for file in (one, two, gone):
        file.write_bytes(file.name.encode())
    first, second = DigestCache(store), DigestCache(store)
    first.digest(one)
    first.digest(gone)
    second.digest(two)
    gone.unlink()
    first.save()
    second.save()
    assert {json.loads(key)[0] for key in json.loads(store.read_text())} == {str(one), str(two)}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": 7}', b'{"not a key": "' + b"0" * 64 + b'"}', b"[" * 100_000])
def test_a_damaged_cache_file_is_a_fresh_start(tmp_path: Path, content: bytes) -> None:
    """Whatever stands in the cache file, digests are right and the file is whole again afterwards."""
    store, file = tmp_path / "digests.json", tmp_path / "file"
    store.write_bytes(content)
    file.write_bytes(b"x")
    cache = DigestCache(store)
    assert cache.digest(file) == hashlib.sha256(b"x").hexdigest()
    cache.save()
    assert list(json.loads(store.read_text()).values()) == [hashlib.sha256(b"x").hexdigest()]


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    """Where the data folder refuses, inspection goes on without memory and leaves nothing behind."""
    (tmp_path / "file").write_bytes(b"x")
    cache = DigestCache(tmp_path / "file" / "digests.json")
    cache.digest(tmp_path / "file")
    cache.save()
    (tmp_path / "folder").mkdir()
    cache = DigestCache(tmp_path / "folder")
    cache.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@contextmanager
def always_growing(file: Path) -> Iterator[None]:
    """A thread that changes the file for as long as the block runs."""
    stop = threading.Event()

    def grow() -> None:
        with file.open("ab") as growing:
            while not stop.is_set():
                growing.write(b"x" * 4096)
                growing.flush()

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_model_that_is_still_being_copied_is_not_usable_yet(root: Path) -> None:
    """A file that changes while it is read makes the folder wait for the next look."""
    folder = make_model(root / "model")
    readme = folder / "merges.txt"
    readme.write_bytes(b"x" * 24 * 1024**2)
    with always_growing(readme):
        assert "still being written" in (inspect_one(root).unsafe_because or "")
    assert inspect_one(root).is_usable


def test_inspection_stops_when_asked_and_keeps_what_it_learnt(root: Path, tmp_path: Path) -> None:
    """Between models, and within a large file, it ends with InspectionStopped; the digests so far are saved."""
    make_model(root / "a")
    make_model(root / "b")
    store = tmp_path / "digests.json"
    asked = False
    models = each_model(root, DigestCache(store), is_stopped=lambda: asked)
    assert next(models).name == "a"
    asked = True
    with pytest.raises(InspectionStopped):
        next(models)
    assert len(json.loads(store.read_text())) == 4
    (root / "big").write_bytes(b"x" * 1024**2)
    with pytest.raises(InspectionStopped):
        DigestCache().digest(root / "big", lambda: True)


def test_a_second_look_reads_no_weights_again(root: Path) -> None:
    """With its digests known, a root is inspected without asking whether to stop within any file."""
    make_model(root / "model")
    cache = DigestCache()
    inspect_models(root, cache)
    asked: list[None] = []

    def is_stopped() -> bool:
        asked.append(None)
        return False

    inspect_models(root, cache, is_stopped=is_stopped)
    assert len(asked) == 1


# ---------------------------------------------------------------------------------------- raw exports


def add_export(folder: Path, entry: object, file: str = "norm.raw") -> Path:
    """Give a model an export with this entry and a file."""
    (folder / "gds_export").mkdir()
    (folder / "gds_export" / file).write_bytes(b"raw")
    (folder / "gds_export" / "manifest.json").write_text(json.dumps({"model.norm.weight": entry}))
    return folder


def test_a_sound_export_is_known_and_belongs_to_the_digest(root: Path) -> None:
    """A model with an export that may be read says so, and is another model than the same one without."""
    make_model(root / "plain")
    add_export(make_model(root / "exported"), {"path": "norm.raw", "dtype": "float16", "shape": [16]})
    exported, plain = inspect_models(root, DigestCache())
    assert (exported.has_gds_export, exported.gds_export_problem) == (True, None)
    assert (plain.has_gds_export, plain.gds_export_problem) == (False, None)
    assert exported.digest != plain.digest
    (root / "exported" / "gds_export" / "norm.raw").write_bytes(b"other")
    assert inspect_models(root, DigestCache())[0].digest != exported.digest


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ("norm.raw", "object"),
        ({"dtype": "float16"}, "no path"),
        ({"path": "", "dtype": "float16"}, "no path"),
        ({"path": ".", "dtype": "float16"}, "outside"),
        ({"path": "../config.json", "dtype": "float16"}, "outside"),
        ({"path": "/etc/passwd", "dtype": "float16"}, "outside"),
        ({"path": "a\\norm.raw", "dtype": "float16"}, "outside"),
        ({"path": "gone.raw", "dtype": "float16"}, "missing"),
        ({"path": "norm.PT", "dtype": "float16"}, "pickle"),
        ({"path": "norm.raw", "dtype": "torch.float16"}, "dtype"),
        ({"path": "norm.raw"}, "dtype"),
        ({"path": "norm.raw", "dtype": "uint8", "packed": "mxfp4"}, "mxfp4"),
    ],
)
def test_a_doubtful_export_is_left_alone(root: Path, entry: object, word: str) -> None:
    """The model stays usable; its export does not count, and the profile says why."""
    add_export(make_model(root / "model"), entry)
    profile = inspect_one(root)
    assert profile.is_usable
    assert not profile.has_gds_export
    assert word in (profile.gds_export_problem or "")


@pytest.mark.parametrize("manifest", ["{}", "[]", "not json", '{"a": 1}'])
def test_a_manifest_that_is_none_is_no_export(root: Path, manifest: str) -> None:
    """Only an object that names tensors is a manifest."""
    folder = add_export(make_model(root / "model"), {})
    (folder / "gds_export" / "manifest.json").write_text(manifest)
    profile = inspect_one(root)
    assert (profile.is_usable, profile.has_gds_export, bool(profile.gds_export_problem)) == (True, False, True)


def test_a_pickle_in_an_export_refuses_the_whole_model(root: Path) -> None:
    """The export is part of the tree, in which no pickle may lie."""
    add_export(make_model(root / "model"), {"path": "norm.pt", "dtype": "float16"}, file="norm.pt")
    assert "pickle" in (inspect_one(root).unsafe_because or "")


# ---------------------------------------------------------------------------------------- hostile configurations


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, "many", [], {}, 2**70])
def test_senseless_facts_count_as_unknown(root: Path, value: object) -> None:
    """A size that is no sensible whole number is zero, and the KV cache is then over-estimated, never free."""
    make_model(root / "model", {**dict.fromkeys(TINY_LLAMA, value), "architectures": ["LlamaForCausalLM"]})
    profile = inspect_one(root)
    assert profile.unsafe_because is None
    assert (profile.layer_count, profile.hidden_size, profile.attention_heads, profile.max_context_tokens) == (0, 0, 0, None)
    assert profile.kv_bytes_per_token >= 1024**2
    assert profile.vocabulary_size == 64
    assert profile.dtype == "float32"


@pytest.mark.parametrize("value", [None, "LlamaForCausalLM", [], [None], [["x"]], ["not an identifier"], ["x" * 200]])
def test_senseless_architectures_count_as_unknown(root: Path, value: object) -> None:
    """Without a sensible architecture there is neither a kind nor a family."""
    make_model(root / "model", {**TINY_LLAMA, "architectures": value})
    profile = inspect_one(root)
    assert (profile.architecture, profile.kind, profile.family) == (None, None, None)


def test_tensors_tell_the_dtype_where_the_configuration_does_not(root: Path) -> None:
    """The dtype of most parameters counts; a configured one wins, and the weights are counted as they will be loaded."""
    tensors = {**TENSORS, "model.layers.0.mlp.up_proj.weight": ("BF16", (999, 16))}
    config = {name: value for name, value in TINY_LLAMA.items() if name != "dtype"}
    make_model(root / "a", config, tensors)
    make_model(root / "b", {**config, "torch_dtype": "torch.float16"}, {**TENSORS, "packed": ("U8", (10,))})
    first, second = inspect_models(root, DigestCache())
    assert first.dtype == "bfloat16"
    assert first.weight_bytes == 2 * first.parameter_count
    assert second.dtype == "float16"
    assert second.weight_bytes == 2 * (second.parameter_count - 10) + 10


EXTENT = {"path": "norm.raw", "dtype": "uint8", "shape": [4096], "offset": 0, "crc32": 0, "first": None, "tensors": []}


def test_extents_without_an_origin_do_not_count(root: Path) -> None:
    """An export that lists tensors as ours do has to say what it was made of."""
    add_export(make_model(root / "model"), EXTENT)
    assert inspect_one(root).gds_export_problem == "its extents have no origin"
