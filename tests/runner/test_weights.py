"""Does a model of which layers come from disk answer as the whole one does, and what if those files are damaged?"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ollm_service.core.laying_out import (
    extents_bytes,
    joined_bytes,
    joining_host_bytes,
    laying_out_bytes,
    manifest_entry,
    manifest_line,
)
from ollm_service.core.passes import Applied, NotNeeded
from ollm_service.core.plan import GenericModelKind, PassId
from ollm_service.core.profile import ModelProfile
from ollm_service.core.wire import AttemptFailed, Execute, Finished, Loaded
from ollm_service.inspection import DigestCache, inspect_models
from tests.runner.commands import answers, first_outcomes, make_command, of_kind, only, results_of, run, work_row
from tests.runner.disks import is_on_a_disk
from tests.runner.models import ROOT, plain_greedy, save_model
from tests.waiting import wait_for
from workers.cache_folder import take_folder
from workers.runner.engine import Engine
from workers.runner.interruptions import AttemptEnded
from workers.runner.kv.files import free_bytes
from workers.runner.raw import pages
from workers.runner.weights.extents import (
    ALIGNMENT,
    CorruptExtents,
    ExtentFile,
    ExtentWriter,
    Origin,
)
from workers.runner.weights.offload import load_offloaded
from workers.runner.weights.repack import loaded_on_disk, open_extents, write_model

OFFLOAD, CHUNKS = PassId.CPU_OFFLOAD, PassId.MLP_CHUNKING
PROMPTS = ["one two", "a somewhat longer prompt, so that rows are padded", "3"]
NEW_TOKENS = 8
ORIGIN = Origin(digest="d" * 64, transformers="5")


def nothing() -> None:
    """What is called while weights are brought."""


def command(model: Path, cache: Path, layers: tuple[int, ...], passes: tuple[PassId, ...] = (OFFLOAD,)) -> Execute:
    """Answer the prompts with these layers coming from disk."""
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    return make_command(model, rows, passes=passes, cache_dir=cache, disk_layers=layers, micro_batch=3)


def weights_folder(order: Execute) -> Path:
    """Where the model's extents are."""
    assert order.weights_dir is not None
    return Path(order.weights_dir, order.profile.digest)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", (0, 1)),
        ("llama", (1,)),
        ("gpt2", (0, 1)),
        ("gemma3", (1, 2)),
        ("qwen3-moe", (0, 1, 2, 3)),
        ("qwen3-moe", (2,)),
        ("gpt-oss", (1, 2, 3)),
    ],
)
def test_streamed_layers_keep_the_tokens(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path, family: str, layers: tuple[int, ...]
) -> None:
    """Rows get the tokens that plain transformers gives them, and the pass shows which layers came and how many bytes."""
    model = families(family)
    messages = run(engine, command(model, tmp_path, layers))
    found = {row: result.text for row, result in results_of(messages).items()}
    assert found == {index: plain_greedy(model, prompt, NEW_TOKENS) for index, prompt in enumerate(PROMPTS)}
    outcome = first_outcomes(messages)[OFFLOAD]
    assert isinstance(outcome, Applied)
    named = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
    assert outcome.evidence.startswith(f"layers {named} from disk; brought ")
    measured = only(messages, Finished).measured
    assert measured["layers_brought"] == len(layers) * measured["passes"]


def test_layers_from_disk_need_not_lie_together(engine: Engine, families: Callable[[str], Path], tmp_path: Path) -> None:
    """Named one by one they are brought in their order, and the evidence says which."""
    model = families("gemma3")
    messages = run(engine, command(model, tmp_path, (0, 2, 3)))
    whole = results_of(run(engine, command(model, tmp_path, ())))
    assert results_of(messages) == whole
    outcome = first_outcomes(messages)[OFFLOAD]
    assert isinstance(outcome, Applied)
    assert outcome.evidence.startswith("layers 0, 2-3 from disk; brought ")


def test_a_warm_model_streams_again_and_another_placement_loads_anew(families: Callable[[str], Path], tmp_path: Path) -> None:
    """The same layers: nothing is loaded again. Others, or none: the model is loaded for them. The answers stay."""
    model, engine = families("qwen3-moe"), Engine()
    first = command(model, tmp_path, (1, 2))
    whole = command(model, tmp_path, ())
    runs = [run(engine, order) for order in (first, first, command(model, tmp_path, (3,)), whole, first)]
    assert [only(messages, Loaded).was_warm for messages in runs] == [False, True, False, False, False]
    texts = [{row: result.text for row, result in results_of(messages).items()} for messages in runs]
    assert all(text == texts[0] for text in texts)
    assert first_outcomes(runs[3])[OFFLOAD] == NotNeeded(reason="no layer to offload")


def test_with_chunks_the_weights_reach_the_replaced_modules(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path
) -> None:
    """Another pass may put modules around a layer's own: the weights go where the layer's are."""
    order = command(families("llama"), tmp_path, (0, 1), passes=(OFFLOAD, CHUNKS))
    found = {row: result.text for row, result in answers(engine, order).items()}
    whole = {row: result.text for row, result in answers(engine, command(families("llama"), tmp_path, ())).items()}
    assert found == whole


def test_weights_are_laid_out_once(families: Callable[[str], Path], tmp_path: Path) -> None:
    """A second runner, and another placement, read the extents that the first has written."""
    model = families("llama")
    order = command(model, tmp_path, (0, 1))
    first = only(run(Engine(), order), Finished).measured
    before = {path.name: path.stat().st_mtime_ns for path in weights_folder(order).iterdir()}
    assert {"weights.extents", "manifest.jsonl", "writer.lock"} == set(before)
    second = only(run(Engine(), command(model, tmp_path, (1,))), Finished).measured
    extents = (weights_folder(order) / "weights.extents").stat()
    assert before["weights.extents"] == extents.st_mtime_ns
    if "disk_bytes_written" in first and is_on_a_disk(tmp_path):
        assert first["disk_bytes_written"] >= extents.st_size > second["disk_bytes_written"]
        assert second["disk_bytes_read"] >= second["weight_bytes_read"]


def test_a_damaged_extent_is_made_again_when_it_is_loaded(families: Callable[[str], Path], tmp_path: Path) -> None:
    """A flipped bit in what is resident shows in the checksum while loading, and the weights are laid out once more."""
    order = command(families("llama"), tmp_path, (1,))
    right = answers(Engine(), order)
    flip_a_bit(weights_folder(order), at=100)
    assert answers(Engine(), order) == right


@pytest.mark.parametrize("is_gone", [False, True])
def test_extents_that_were_cut_short_are_made_again(families: Callable[[str], Path], tmp_path: Path, is_gone: bool) -> None:
    """What the manifest lists and the file does not hold is written again, not filled with nothing: the same attempt answers."""
    order = command(families("llama"), tmp_path, (0, 1))
    right = answers(Engine(), order)
    path = weights_folder(order) / "weights.extents"
    if is_gone:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - ALIGNMENT)
    assert answers(Engine(), order) == right


def test_who_meets_a_bad_extent_does_not_delete_what_another_has_made_anew(tmp_path: Path) -> None:
    """A runner that still reads the old file leaves the new one alone."""
    for number in range(2):
        writer = ExtentWriter(tmp_path, ORIGIN)
        writer.append("layer", [("weight", torch.full((8,), float(number)))], nothing)
        writer.finish()
        writer.close()
        if number == 0:
            old = ExtentFile(tmp_path, ORIGIN)
            old.delete()
    assert isinstance(old.refusal(CorruptExtents("x")), AttemptEnded)
    assert ExtentFile(tmp_path, ORIGIN).extents.keys() == {"layer"}


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """Who goes on with a full disk keeps what was done before, and leaves no file open."""
    writer = ExtentWriter(tmp_path, ORIGIN)
    writer.append("layer", [("weight", torch.ones(8))], nothing)
    writer.finish()
    writer.close()
    (tmp_path / "manifest.jsonl.part").mkdir()
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    with pytest.raises(OSError, match="directory"):
        ExtentWriter(tmp_path, ORIGIN)
    assert not opened or len(os.listdir("/proc/self/fd")) == opened
    assert ExtentFile(tmp_path, ORIGIN).extents.keys() == {"layer"}


def test_a_damaged_extent_found_while_streaming_ends_the_attempt_and_not_the_next(
    families: Callable[[str], Path], tmp_path: Path
) -> None:
    """No row is answered with wrong weights; the extents are gone, and the next attempt makes them again."""
    order = command(families("llama"), tmp_path, (0, 1))
    right = answers(Engine(), order)
    path = weights_folder(order) / "weights.extents"
    flip_a_bit(weights_folder(order), at=path.stat().st_size - ALIGNMENT)
    engine = Engine()
    failed = only(run(engine, order), AttemptFailed)
    assert (failed.stage, failed.code, failed.is_permanent) == ("generating", "weights_corrupt", False)
    assert answers(engine, order) == right


def test_no_room_for_extents_is_said_in_bytes(families: Callable[[str], Path], tmp_path: Path) -> None:
    """Before anything is written, and without a folder it is said that one is needed."""
    order = command(families("llama"), tmp_path, (0, 1))
    failed = only(run(Engine(), replace(order, profile=replace(order.profile, weight_bytes=10**18))), AttemptFailed)
    assert failed.code == "disk_full"
    assert f"{laying_out_bytes(replace(order.profile, weight_bytes=10**18)):,} bytes are needed" in failed.message
    assert not (weights_folder(order) / "weights.extents").stat().st_size
    nowhere = only(run(Engine(), replace(order, weights_dir=None)), AttemptFailed)
    assert nowhere.code == "no_cache_folder"


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_a_disk_that_fills_up_while_weights_are_laid_out_says_so(
    families: Callable[[str], Path], small_disk: Path, family: str
) -> None:
    """A model of which nothing is known takes what there is. With room again the next attempt goes on and answers."""
    order = command(families(family), small_disk, (0, 1))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free_bytes(small_disk) - 64 * 1024))
    failed = only(run(Engine(), order), AttemptFailed)
    assert (failed.stage, failed.code, failed.is_permanent) == ("loading", "disk_full", False)
    assert "No space left" in failed.message
    filler.unlink()
    assert answers(Engine(), order)[0].error is None


def profile_of(model: Path) -> ModelProfile:
    """What inspection learns of a model."""
    return next(found for found in inspect_models(model.parent, DigestCache()) if found.path.name == model.name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3-moe", "qwen3-next", "mixtral", "gpt-oss"])
def test_the_room_that_is_asked_for_is_what_it_takes(families: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Of the disk extents take no more than planning says; beside them lies what inspection says that transformers joins."""
    model, folder, scratch = families(family), tmp_path / "extents", tmp_path / "scratch"
    found = profile_of(model)
    module, loader = loaded_on_disk(model, scratch, found.kind)
    beside = [path.stat().st_size for path in scratch.iterdir()] if scratch.exists() else []
    assert found.joined_bytes is not None
    assert found.joined_bytes == joined_bytes(found)
    assert found.joined_bytes <= sum(beside) <= found.joined_bytes + 1024 * len(beside)
    writer = ExtentWriter(folder, ORIGIN)
    write_model(writer, module, loader, nothing)
    writer.close()
    taken = sum(path.stat().st_size for path in folder.iterdir())
    assert found.weight_bytes < taken <= extents_bytes(found)


_LAY_OUT = """
import sys
from pathlib import Path
from ollm_service.core.plan import GenericModelKind
from workers.runner.memory import PrivatePeak, give_back_what_is_freed, private_host_bytes
give_back_what_is_freed()
from workers.runner.weights.extents import Origin
from workers.runner.weights.repack import open_extents
model, folder, small = map(Path, sys.argv[1:])
origin, kind = Origin(digest="d" * 64, transformers="5"), GenericModelKind.CAUSAL_LM
open_extents(small, folder / "small", origin, kind, 0, lambda: None)  # what code and tables take is there then
before = private_host_bytes()
with PrivatePeak() as memory:
    open_extents(model, folder / "large", origin, kind, 0, lambda: None)
print(memory.peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_joining_experts_takes_the_memory_that_is_counted_for_it(families: Callable[[str], Path], tmp_path: Path) -> None:
    """Two and a half times the largest joined tensor, here 64 MiB of gates and ups, and not the whole of the experts."""
    sizes: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 4}
    model = save_model(tmp_path / "models" / "experts", "qwen3-moe", initializer_range=0.05, **sizes)
    counted = joining_host_bytes(profile_of(model))
    assert counted == 160 * 1024**2
    folders = [str(folder) for folder in (model, tmp_path, families("qwen3-moe"))]
    ended = subprocess.run([sys.executable, "-c", _LAY_OUT, *folders], capture_output=True, text=True, check=True)
    assert 0.75 * counted < int(ended.stdout) < 1.05 * counted


def test_a_model_that_is_only_read_needs_its_room_once(families: Callable[[str], Path], small_disk: Path) -> None:
    """Nothing of a Llama is joined: it is laid out on a disk that would not hold it twice."""
    model = families("llama")
    order = command(model, small_disk, (0, 1))
    order = replace(order, profile=profile_of(model))
    needed = laying_out_bytes(order.profile)
    assert needed < 2 * order.profile.weight_bytes
    (small_disk / "filler").write_bytes(bytes(free_bytes(small_disk) - needed - 16 * 1024))
    assert answers(Engine(), order)[0].error is None


def flip_a_bit(folder: Path, at: int) -> None:
    """Change one bit of the extents' bytes."""
    with (folder / "weights.extents").open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# ---------------------------------------------------------------------------------------- the files themselves


def written(folder: Path, names: tuple[str, ...] = ("", "layers.0", "layers.1")) -> dict[str, torch.Tensor]:
    """Extents of one tensor each, and what they hold."""
    tensors = {name: torch.randn(3, 700 + index) for index, name in enumerate(names)}
    writer = ExtentWriter(folder, ORIGIN)
    try:
        for name, tensor in tensors.items():
            if name not in writer.written:
                scale = torch.tensor(2.5, dtype=torch.bfloat16)
                writer.append(name, [(f"{name}.weight", tensor), (f"{name}.scale", scale)], nothing)
        writer.finish()
    finally:
        writer.close()
    return tensors


def read_back(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one extent."""
    source = ExtentFile(folder, ORIGIN)
    try:
        buffer = pages(source.extents[name].size)
        extent = source.read(name, buffer)
        assert extent is not None
        return {span.name: span.of(buffer).clone() for span in extent.spans}
    finally:
        source.close()


def test_extents_come_back_bit_by_bit(tmp_path: Path) -> None:
    """Shapes, dtypes and bits; each begins at a page."""
    tensors = written(tmp_path)
    for name, tensor in tensors.items():
        found = read_back(tmp_path, name)
        assert torch.equal(found[f"{name}.weight"], tensor)
        assert (found[f"{name}.scale"].dtype, found[f"{name}.scale"].item()) == (torch.bfloat16, 2.5)
    source = ExtentFile(tmp_path, ORIGIN)
    assert all(extent.offset % ALIGNMENT == extent.size % ALIGNMENT == 0 for extent in source.extents.values())
    source.close()


@pytest.mark.parametrize("kept_bytes", [0.3, 0.6, 0.95])
def test_a_writer_goes_on_where_another_was_killed(tmp_path: Path, kept_bytes: float) -> None:
    """A manifest that breaks off in the middle of a line counts up to its last whole one."""
    written(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    text = manifest.read_bytes()
    manifest.write_bytes(text[: int(len(text) * kept_bytes)])
    whole = manifest.read_bytes().count(b"\n") - 1
    with pytest.raises(CorruptExtents):
        ExtentFile(tmp_path, ORIGIN)
    writer = ExtentWriter(tmp_path, ORIGIN)
    writer.close()
    assert len(writer.written) == max(0, whole)
    kept = {name: read_span(tmp_path, writer, name) for name in writer.written}
    tensors = written(tmp_path)
    for name in tensors:
        expected = kept.get(name, tensors[name])
        assert torch.equal(read_back(tmp_path, name)[f"{name}.weight"], expected)


def read_span(folder: Path, writer: ExtentWriter, name: str) -> torch.Tensor:
    """An extent's first tensor, straight from the file."""
    extent = writer.written[name]
    data = (folder / "weights.extents").read_bytes()[extent.offset : extent.offset + extent.size]
    return extent.spans[0].of(torch.frombuffer(bytearray(data), dtype=torch.uint8)).clone()


def test_extents_of_something_else_do_not_count(tmp_path: Path) -> None:
    """Another model or another version of transformers: they are written anew."""
    written(tmp_path)
    for other in (Origin(digest="e" * 64, transformers="5"), Origin(digest="d" * 64, transformers="6")):
        with pytest.raises(CorruptExtents, match="holds no whole model"):
            ExtentFile(tmp_path, other)
    writer = ExtentWriter(tmp_path, Origin(digest="e" * 64, transformers="5"))
    writer.close()
    assert writer.written == {}


def test_a_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    """Before anything is read from it."""
    written(tmp_path)
    path = tmp_path / "weights.extents"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptExtents, match="too short"):
        ExtentFile(tmp_path, ORIGIN)


def test_reading_stops_when_it_is_told_to(tmp_path: Path) -> None:
    """Nothing is given of an extent that was not read to its end."""
    written(tmp_path)
    source = ExtentFile(tmp_path, ORIGIN)
    assert source.read("", pages(source.extents[""].size), lambda: True) is None
    source.close()


def test_every_message_of_a_streaming_plan_is_one_of_the_protocol(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path
) -> None:
    """What was measured holds the bytes read: at least each layer once a token."""
    order = command(families("qwen3-moe"), tmp_path, (1, 2))
    messages = run(engine, order)
    measured = messages[-1].measured  # type: ignore[union-attr]
    source = ExtentFile(weights_folder(order), Origin(digest=order.profile.digest, transformers=transformers.__version__))
    a_pass = sum(extent.size for layer in (1, 2) for extent in source.layer(f"model.layers.{layer}"))
    source.close()
    assert measured["layers_brought"] == 2 * NEW_TOKENS
    assert a_pass * NEW_TOKENS <= measured["weight_bytes_read"] <= a_pass * (NEW_TOKENS + 2)
    assert not of_kind(messages, AttemptFailed)


def test_a_manifest_that_has_changed_is_never_believed(families: Callable[[str], Path], tmp_path: Path) -> None:
    """A tensor that is said to lie elsewhere would be read without an error: the weights are laid out again instead."""
    order = command(families("llama"), tmp_path, (0, 1))
    right = answers(Engine(), order)
    manifest = weights_folder(order) / "manifest.jsonl"
    text = manifest.read_bytes()
    (place,) = re.findall(rb'k_proj.weight","float32",\[\d+,\d+\],(\d+)', text)[:1]
    changed = text.replace(b",%b," % place, b",%d," % (int(place) + 64), 1)
    assert changed != text
    manifest.write_bytes(changed)
    assert answers(Engine(), order) == right
    assert manifest.read_bytes() == text


def test_two_runners_lay_one_model_out_once(families: Callable[[str], Path], tmp_path: Path) -> None:
    """The second waits for the first one's lock, says meanwhile that it is alive, and reads what the first has written."""
    model, order = families("llama"), command(families("llama"), tmp_path, (0, 1))
    waits, may_go_on = threading.Event(), threading.Event()
    written: list[str] = []

    def first_visit() -> None:
        written.append("a tensor")
        assert may_go_on.wait(timeout=30), "the second never came to wait"

    def second_visit() -> None:
        waits.set()
        may_go_on.set()

    origin = Origin(digest=order.profile.digest, transformers=transformers.__version__)
    folder, kind = weights_folder(order), GenericModelKind.CAUSAL_LM
    first = threading.Thread(target=lambda: open_extents(model, folder, origin, kind, 0, first_visit).close())
    first.start()
    wait_for(lambda: bool(written), timeout=30, what="the first runner's first tensor")
    open_extents(model, folder, origin, kind, 0, second_visit).close()
    first.join(timeout=30)
    assert waits.is_set()
    assert {path.name for path in folder.iterdir()} == {"weights.extents", "manifest.jsonl", "writer.lock"}


KILLED = """
import os
import signal
import sys
from pathlib import Path
from ollm_service.core.plan import GenericModelKind
from workers.runner.weights.extents import Origin
from workers.runner.weights.repack import open_extents
model, folder, digest, version = sys.argv[1:]
origin = Origin(digest=digest, transformers=version)
open_extents(
    Path(model), Path(folder), origin, GenericModelKind.CAUSAL_LM, 0, lambda: os.kill(os.getpid(), signal.SIGKILL)
)
"""


def test_a_worker_sweeps_what_a_killed_layout_needed_no_longer(families: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever model its runners lay out next; that one is laid out from where it was left."""
    model, order = families("qwen3-moe"), command(families("qwen3-moe"), tmp_path, (0, 1))
    folder = weights_folder(order)
    arguments = [str(model), str(folder), order.profile.digest, transformers.__version__]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((folder / "loading").iterdir())
    take_folder(tmp_path).release()
    assert {path.name for path in folder.iterdir()} == {"weights.extents", "manifest.jsonl", "writer.lock"}
    assert answers(Engine(), order)[0].error is None


def test_weights_that_are_spoilt_twice_end_the_attempt(families: Callable[[str], Path], tmp_path: Path) -> None:
    """A disk that gives back other bytes than were written: laid out once more, and then an end that says so."""
    order = command(families("llama"), tmp_path, (1,))
    path = weights_folder(order) / "weights.extents"

    def spoil() -> None:
        if path.exists() and path.stat().st_size > 200:
            with path.open("r+b") as file:
                file.seek(100)
                file.write(b"\xff" * 4)

    with pytest.raises(AttemptEnded, match="written twice") as ended:
        load_offloaded(order, torch.device("cpu"), spoil)
    assert ended.value.code == "weights_corrupt"


def test_a_weight_that_is_nowhere_is_never_computed_with(families: Callable[[str], Path], tmp_path: Path) -> None:
    """On the CPU torch makes up a product with a tensor without memory: the attempt ends before any."""
    order = command(families("llama"), tmp_path, (0, 1))
    answers(Engine(), order)
    manifest = weights_folder(order) / "manifest.jsonl"
    lines = [manifest_entry(line) for line in manifest.read_bytes().splitlines()]
    (around,) = (line for line in lines if line.get("name") == "")
    lost = around["tensors"].pop()[0]
    manifest.write_bytes(b"".join(manifest_line(line) for line in lines))
    failure = only(run(Engine(), order), AttemptFailed)
    assert failure.code == "load_failed"
    assert lost in failure.message
