"""What does a worker say of its machine, and does it say so only where it is true?"""

import fcntl
import os
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.plan import BackendId, ModelModality, PassId
from workers.cache_folder import NoCacheFolder, measure, take_folder
from workers.host_memory import host_memory, private_bytes
from workers.nvml import Gpu, Nvml, NvmlUnavailable, visible
from workers.probe import Claims, Probe

_OPTIONAL = {"pillow": "PIL", "compressed-tensors": "compressed_tensors"}
MIB = 1024**2
GIB = 1024**3
GPUS = tuple(
    Gpu(uuid=f"GPU-{name}{name}", name="a card", total_bytes=8 * GIB, free_bytes=GIB, compute_capability=(8, 6)) for name in "abc"
)


@pytest.fixture
def probe() -> Probe:
    """A probe of this machine."""
    return Probe(Claims(node="here", slots=2, labels={"zone": "a"}), os.environ)


def test_a_worker_says_what_it_can(probe: Probe, tmp_path: Path) -> None:
    """With a cache folder the passes of this engine are offered; every other has its reason."""
    folder = take_folder(tmp_path / "kv")
    offered = probe.capabilities((), [folder.path], None)
    assert (offered.node, offered.slots, offered.labels) == ("here", 2, {"zone": "a"})
    able = {pass_id for pass_id, reason in offered.passes.items() if reason is None}
    has_accelerator = any(device.kind != "cpu" for device in offered.devices)
    assert able == set(PassId) - (set() if has_accelerator else {PassId.GPU_OFFLOAD})
    installed = {name: find_spec(module) is not None for name, module in _OPTIONAL.items()}
    assert (offered.modalities[ModelModality.IMAGE] is None, offered.modalities[ModelModality.AUDIO]) == (
        installed["pillow"],
        None,
    )
    assert (offered.quantizations["compressed-tensors"] is None) == installed["compressed-tensors"]
    assert offered.quantizations["gptq"] is None or "gptqmodel" in offered.quantizations["gptq"]
    assert {kind for kind, reason in offered.kinds.items() if reason is None} == {
        "causal-lm",
        "image-text-to-text",
        "seq2seq-lm",
        "voxtral",
    }
    assert (offered.no_adapters_because is None) == (find_spec("peft") is not None)
    assert offered.passes.keys() == set(PassId)
    assert offered.backends == {backend.value: None for backend in BackendId}
    strategies = {name for name, reason in offered.kv_strategies.items() if reason is None}
    assert strategies == set(KVCacheStrategy)
    assert offered.cache_disk is not None
    assert offered.cache_disk.total_bytes > 0
    assert (offered.cache_disk.write_rate or 0) > 0
    assert offered.devices[-1].device_id == "cpu"
    folder.release()


def test_two_looks_agree(probe: Probe, tmp_path: Path) -> None:
    """What changes all the time is no capability, so that nothing is registered anew without a reason."""
    folder = take_folder(tmp_path / "kv")
    assert probe.capabilities((), [folder.path], None) == probe.capabilities((), [folder.path], None)
    folder.release()


def test_a_cache_folder_that_vanishes_takes_the_disk_cache_along(probe: Probe, tmp_path: Path) -> None:
    """A disk that cannot be written to any more is no longer offered, and the reason names the folder."""
    folder = take_folder(tmp_path / "kv")
    folder.path.rmdir()
    offered = probe.capabilities((), [folder.path], None)
    assert str(folder.path) in (offered.passes[PassId.DISK_CACHE] or "")
    assert {name for name, reason in offered.kv_strategies.items() if reason is None} == {KVCacheStrategy.RESIDENT}
    assert offered.cache_disk is None
    folder.release()


def test_what_our_own_runner_holds_counts_as_free(probe: Probe) -> None:
    """The memory of the runner that would take the plan is added to what the machine has free."""
    ballast = bytearray(os.urandom(1024)) * (64 * 1024)  # 64 MiB, touched
    without = probe.live({}, None, None)
    with_us = probe.live({os.getpid(): None}, None, None)
    gained = with_us.device_free_bytes["cpu"] - without.device_free_bytes["cpu"]
    assert gained > len(ballast) / 2
    assert with_us.device_free_bytes["cpu"] <= host_memory().total


def test_runners_get_no_more_than_the_operator_lets_them_have() -> None:
    """The limit is what the machine seems to have; what the worker's other runners hold counts against it, its own does not."""
    limited = Probe(Claims(node="n", slots=2, memory_limit_bytes=GIB), os.environ)
    offered = limited.capabilities((), [], None)
    assert (offered.host_memory_bytes, offered.main_device.memory_bytes) == (GIB, GIB)
    held = private_bytes(os.getpid())
    assert 0 < held < GIB
    assert limited.live({os.getpid(): None}, None, None).host_free_bytes == GIB
    beside = limited.live({}, None, None, others=[os.getpid()])
    assert beside.device_free_bytes["cpu"] == beside.host_free_bytes == pytest.approx(GIB - held, rel=0.05)


def test_layers_can_leave_the_device_where_there_is_a_disk(probe: Probe, tmp_path: Path) -> None:
    """Weights are read from a folder beside the KV files; without one layers stay."""
    folder = take_folder(tmp_path / "kv")
    offered = probe.capabilities((), [folder.path], None)
    passes = offered.passes
    assert (passes[PassId.CPU_OFFLOAD], passes[PassId.MOE_ROUTING]) == (None, None)
    is_alone = all(device.kind == "cpu" for device in offered.devices)
    assert passes[PassId.GPU_OFFLOAD] == ("no accelerator" if is_alone else None)
    assert "no writable cache directory" in (probe.capabilities((), [], None).passes[PassId.CPU_OFFLOAD] or "")
    folder.release()


def test_the_versions_of_the_runners_libraries_are_told() -> None:
    """The fleet sees which torch a worker's runners use, though the supervising process never loads it."""
    assert Probe(Claims(node="n", slots=1), os.environ).capabilities((), [], None).versions["torch"]


def test_a_container_limits_memory(tmp_path: Path) -> None:
    """The tightest control group on the way up counts; pages of files that can be dropped count as free."""
    for path, limit, used in ((".", "max", GIB), ("outer", 2 * GIB, GIB), ("outer/inner", 3 * GIB, GIB // 2)):
        group = tmp_path / "cgroup" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {256 * MIB}\n")
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    memory = host_memory(cgroups=tmp_path / "cgroup", own_cgroup=own)
    assert memory.total == min(2 * GIB, psutil.virtual_memory().total)
    assert memory.free <= GIB + 256 * MIB


def test_an_older_container_limits_memory(tmp_path: Path) -> None:
    """The first version of control groups is read as well."""
    group = tmp_path / "cgroup" / "memory" / "box"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{GIB // 2}\n")
    (group / "memory.stat").write_text("total_inactive_file 0\n")
    own = tmp_path / "own"
    own.write_text("5:cpu,memory:/box\n1:name=systemd:/\n")
    memory = host_memory(cgroups=tmp_path / "cgroup", own_cgroup=own)
    assert (memory.total, memory.free) == (GIB, min(GIB // 2, psutil.virtual_memory().available))


def test_a_process_that_is_gone_holds_nothing() -> None:
    """No error, and no bytes."""
    assert private_bytes(2**22 - 1) == 0


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [
        (None, "abc"),
        ("", ""),
        ("-1", ""),
        ("2,0", "ca"),
        ("GPU-bb", "b"),
        ("1, GPU-a", "ba"),
        ("0,7,1", "a"),
        ("GPU-", ""),
    ],
)
def test_gpus_are_numbered_as_torch_will_number_them(wanted: str | None, seen: str) -> None:
    """CUDA_VISIBLE_DEVICES chooses and orders; from its first unknown entry on, everything is ignored."""
    environment = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    assert "".join(gpu.uuid[-1] for gpu in visible(GPUS, environment)) == seen


def test_without_a_driver_there_is_no_gpu() -> None:
    """A missing library is told as such."""
    with pytest.raises(NvmlUnavailable):
        Nvml("libno-such-driver.so.1")


@pytest.mark.gpu
def test_the_driver_and_torch_agree() -> None:
    """Order, memory and compute capability are those that torch sees."""
    import torch  # noqa: PLC0415 - seconds of import that only this test should pay

    gpus = visible(Nvml().gpus(), os.environ)
    assert len(gpus) == torch.cuda.device_count()
    for number, gpu in enumerate(gpus):
        assert gpu.compute_capability == torch.cuda.get_device_capability(number)
        assert gpu.total_bytes >= torch.cuda.get_device_properties(number).total_memory


def test_slots_never_share_a_folder(tmp_path: Path) -> None:
    """Every slot on a machine gets a folder of its own, and one that is given back is taken again, swept."""
    first, second = take_folder(tmp_path), take_folder(tmp_path)
    assert first.path != second.path
    (first.path / "deep").mkdir()
    (first.path / "deep" / "left").write_bytes(b"x")
    again_path = first.path
    first._lock.close()  # as if its worker had been killed
    again = take_folder(tmp_path)
    assert again.path == again_path
    assert list(again.path.iterdir()) == []
    again.release()
    second.release()


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A model's folder of weights, as a runner that was killed while it laid them out leaves it."""
    folder = tmp_path / "weights" / ("d" * 64)
    (folder / "loading").mkdir(parents=True)
    for name in ("loading/joined.dat", "weights.extents", "manifest.jsonl", "writer.lock"):
        (folder / name).write_bytes(b"x")
    return folder


def test_what_a_killed_layout_left_is_swept(layout: Path, tmp_path: Path) -> None:
    """What is only needed while weights are laid out goes with the worker's start; the next layout goes on from the rest."""
    take_folder(tmp_path).release()
    assert {path.name for path in layout.iterdir()} == {"weights.extents", "manifest.jsonl", "writer.lock"}


def test_a_layout_that_goes_on_is_not_swept(layout: Path, tmp_path: Path) -> None:
    """Its writer, of this worker or another, holds the lock; once that is gone it is swept with the next runner's start."""
    with (layout / "writer.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = take_folder(tmp_path)
        assert (layout / "loading" / "joined.dat").exists()
    folder.sweep()
    assert not (layout / "loading").exists()
    folder.release()


def test_scratch_without_a_lock_is_not_ours(layout: Path, tmp_path: Path) -> None:
    """A runner makes the lock first, so that a folder without one was made by somebody else."""
    (layout / "writer.lock").unlink()
    take_folder(tmp_path).release()
    assert (layout / "loading").exists()


def test_sweeping_does_not_follow_links(tmp_path: Path) -> None:
    """What a link in the folder points to stays."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"x")
    folder = take_folder(tmp_path / "kv")
    (folder.path / "link").symlink_to(precious)
    assert folder.sweep() == 1
    assert (precious / "file").exists()
    folder.release()


def test_a_root_that_cannot_be_made_is_told_with_its_reason(tmp_path: Path) -> None:
    """A file in the way, for one."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NoCacheFolder, match="cannot be written to"):
        take_folder(tmp_path / "file" / "kv")


def test_measuring_leaves_nothing_behind(tmp_path: Path) -> None:
    """Rates are positive, the probe file is gone, and a folder that is not there has no rates."""
    rates = measure(tmp_path)
    assert rates is not None
    assert min(rates.read, rates.write) > 0
    assert list(tmp_path.iterdir()) == []
    assert measure(tmp_path / "nowhere") is None
