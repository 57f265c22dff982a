"""Is there room for a KV cache, and what does it take? Known before work starts, kept while it goes on, nothing left behind."""

import contextlib
import gc
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ollm_service.core.estimates import PAGE_TOKENS
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.plan import PassId
from ollm_service.core.profile import ModelProfile
from ollm_service.core.wire import AttemptFailed, BatchDone, Execute, Message, SpecializationFailed
from ollm_service.inspection import DigestCache, inspect_models
from tests.runner.commands import make_command, of_kind, only, results_of, run, work_row
from tests.runner.forcing import loaded
from workers.runner.engine import Engine
from workers.runner.kv.files import LayerFile, free_bytes
from workers.runner.kv.paged import Paged
from workers.runner.kv.quantized import QuantizedColdTier
from workers.runner.kv.ring import SlidingWindowRingBuffer
from workers.runner.kv.strategy import Strategy, cache_in_files
from workers.runner.kv.traffic import Traffic

IN_FILES = (
    KVCacheStrategy.PAGED,
    KVCacheStrategy.QUANTIZED_COLD_TIER,
    KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER,
)
STRATEGIES: list[Strategy] = [Paged(), QuantizedColdTier(), SlidingWindowRingBuffer(64)]
KIB = 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def command(model: Path, cache_dir: Path, kv: KVCacheStrategy, kv_bytes_per_token: int, count: int = 1) -> Execute:
    """Rows of 300 + 40 tokens, one after another, for a model of whose profile so much is known."""
    rows = [work_row(index, "x" * 299, max_new_tokens=40) for index in range(count)]
    order = make_command(model, rows, passes=(PassId.DISK_CACHE,), kv=kv, cache_dir=cache_dir, micro_batch=1)
    return replace(order, profile=replace(order.profile, kv_bytes_per_token=kv_bytes_per_token, dtype="float32"))


def fill(folder: Path) -> None:
    """Leave no room on this disk."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4 * KIB))
    assert free_bytes(folder) == 0


@pytest.mark.parametrize("kv", IN_FILES)
def test_too_little_room_is_said_before_work_in_bytes(engine: Engine, llama: Path, tmp_path: Path, kv: KVCacheStrategy) -> None:
    """A cache that is larger than any disk fails the pass; nothing is computed, and no file is left."""
    messages = run(engine, command(llama, tmp_path, kv, kv_bytes_per_token=2**50))
    failure = only(messages, SpecializationFailed)
    assert failure.reason.startswith("disk-cache: No space left for the KV cache: its files may take ")
    assert failure.reason.endswith(" are free")
    assert failure.error_type == "NoRoomForCache"
    assert not of_kind(messages, BatchDone)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kv", IN_FILES)
def test_room_is_taken_for_the_longest_that_rows_may_become(
    engine: Engine, llama: Path, small_disk: Path, kv: KVCacheStrategy
) -> None:
    """What fits runs; what might not, at the end of its answer, does not start."""
    # 340 tokens, or 256 in the ring, of which int8 makes a quarter and a scale for each of the profile's "heads".
    fitting = {KVCacheStrategy.PAGED: 1_400, KVCacheStrategy.QUANTIZED_COLD_TIER: 1_200}.get(kv, 1_900)
    fits = run(engine, command(llama, small_disk, kv, kv_bytes_per_token=fitting))
    assert results_of(fits)[0].completion_tokens == 40
    failure = only(run(engine, command(llama, small_disk, kv, kv_bytes_per_token=4 * fitting)), SpecializationFailed)
    assert failure.error_type == "NoRoomForCache"
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_between_micro_batches_ends_the_attempt(engine: Engine, llama: Path, small_disk: Path) -> None:
    """Rows that were answered stay so; the next ones have no room, and only the other's file is left."""
    messages: list[Message] = []

    def report(message: Message) -> None:
        messages.append(message)
        if isinstance(message, BatchDone):
            fill(small_disk)

    order = command(llama, small_disk, KVCacheStrategy.PAGED, kv_bytes_per_token=256, count=2)
    engine.execute(order, report, threading.Event())
    assert len(results_of(messages)) == 1
    failure = only(messages, AttemptFailed)
    assert (failure.code, failure.error_type) == ("pass_failed", "NoRoomForCache")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("kv", IN_FILES)
def test_a_disk_that_is_full_in_the_middle_fails_the_pass(
    engine: Engine, llama: Path, small_disk: Path, kv: KVCacheStrategy
) -> None:
    """A model of which nothing is known takes what there is; the system's reason is told, and the files are gone."""
    order = command(llama, small_disk, kv, kv_bytes_per_token=0)
    with (small_disk / "filler").open("wb") as file:
        file.write(bytes(free_bytes(small_disk) - 24 * KIB))
    failure = only(run(engine, order), SpecializationFailed)
    assert failure.reason == "disk-cache: the KV cache cannot be written or read back: No space left on device"
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_what_is_reserved_cannot_be_taken(small_disk: Path) -> None:
    """Another's files may fill the disk: what was reserved is written all the same, and not a page more."""
    file = LayerFile(small_disk, 0, "pages", reserved_bytes=100 * KIB)
    fill(small_disk)
    assert file.write(memoryview(bytes(100 * KIB)), 0) == 100 * KIB
    with pytest.raises(OSError, match="No space left"):
        file.write(memoryview(bytes(4 * KIB)), 100 * KIB)
    file.close()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_files_take_what_is_reserved_for_them(
    families: Callable[[str], Path], tmp_path: Path, family: str, strategy: Strategy
) -> None:
    """From a profile alone it is known to the byte what rows of so many tokens take."""
    model = families(family)
    (profile,) = (found for found in inspect_models(model.parent, DigestCache()) if found.path.name == model.name)
    rows, tokens = 3, 150
    with cache_in_files(loaded(model), strategy, tmp_path, Traffic()) as cache:
        feed(loaded(model), cache, torch.randint(5, 90, (rows, tokens)))
        taken = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".jsonl")
    assert taken == strategy.most_file_bytes(profile, rows, tokens) > 0


def test_an_unknown_profile_reserves_nothing() -> None:
    """What is not known is not guessed."""
    unknown = ModelProfile(name="m", path=PurePosixPath("m"), digest="d")
    assert [strategy.most_file_bytes(unknown, 8, 1000) for strategy in STRATEGIES] == [0, 0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_what_is_written_is_released(llama: Path, tmp_path: Path, strategy: Strategy) -> None:
    """After the prompt nothing of it is in memory, and then at most room for the tail; a resident cache holds it all."""
    tokens, a_token = torch.randint(5, 90, (2, 300)), 2 * 2 * 2 * 2 * 8 * 4
    module = loaded(llama)
    before = live_bytes()
    resident = DynamicCache(config=module.config)
    feed(module, resident, tokens)
    assert live_bytes() - before == 300 * a_token
    del resident
    with cache_in_files(module, strategy, tmp_path, Traffic()) as cache:
        feed(module, cache, tokens)
        assert live_bytes() == before
        for position in range(5):
            feed(module, cache, tokens[:, position : position + 1])
        tail = 0 if isinstance(strategy, SlidingWindowRingBuffer) else PAGE_TOKENS
        assert live_bytes() - before == tail * a_token


@torch.inference_mode()
def feed(module: torch.nn.Module, cache: Cache, tokens: Tensor) -> None:
    """One forward pass."""
    module(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)


def live_bytes() -> int:
    """What all tensors that anybody can reach take, storages that several share counted once."""
    gc.collect()
    storages = (found.untyped_storage() for found in gc.get_objects() if type(found) is Tensor)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
