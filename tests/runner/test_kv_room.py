"""Is there room for a KV cache, and what does it take? Known before work starts, kept while it goes on, nothing left behind."""

import contextlib
import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch import Tensor

from ollm_service.core.layout import PAGE_TOKENS
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.pack_memory import kv_file_bytes
from ollm_service.core.packing import MOST_TRIED_TOKENS
from ollm_service.core.plan import PassId
from ollm_service.core.profile import ModelProfile
from ollm_service.core.wire import AttemptFailed, BatchDone, Execute, Message, SpecializationFailed
from ollm_service.inspection import DigestCache, inspect_models
from tests.runner.commands import make_command, of_kind, only, results_of, run, work_row
from tests.runner.forcing import layers_in, loaded
from tests.runner.planned import profile_of
from workers.runner.engine import Engine
from workers.runner.kv.cache import PackCache, layers_of
from workers.runner.kv.files import LayerFile, free_bytes
from workers.runner.kv.quantized import Int8
from workers.runner.kv.strategy import FileStrategy, cache_in_files
from workers.runner.kv.traffic import Traffic
from workers.runner.packed.attachment import PackedModel
from workers.runner.packed.pack import Pack, TokenSequence

IN_FILES = (
    KVCacheStrategy.PAGED,
    KVCacheStrategy.QUANTIZED_COLD_TIER,
    KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER,
)
STRATEGIES = {
    KVCacheStrategy.PAGED: FileStrategy(),
    KVCacheStrategy.QUANTIZED_COLD_TIER: FileStrategy(encoding=Int8()),
    KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER: FileStrategy(window=64),
}
KIB = 1024


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
    # 340 tokens and a page or two; int8 makes of them a quarter and a scale for each of the profile's "heads".
    fitting = 850
    fits = run(engine, command(llama, small_disk, kv, kv_bytes_per_token=fitting))
    assert results_of(fits)[0].completion_tokens == 40
    failure = only(run(engine, command(llama, small_disk, kv, kv_bytes_per_token=4 * fitting)), SpecializationFailed)
    assert failure.error_type == "NoRoomForCache"
    assert not list(small_disk.iterdir())


def test_what_was_reserved_lasts_for_all_rows(engine: Engine, llama: Path, small_disk: Path) -> None:
    """Another's files fill the disk after the first answer; rows that come later have their room all the same."""
    messages: list[Message] = []

    def report(message: Message) -> None:
        messages.append(message)
        if isinstance(message, BatchDone):
            fill(small_disk)

    engine.execute(command(llama, small_disk, KVCacheStrategy.PAGED, kv_bytes_per_token=256, count=3), report, threading.Event())
    assert all(result.error is None for result in results_of(messages).values())
    assert len(results_of(messages)) == 3


def test_a_disk_that_fills_up_after_answers_ends_the_attempt(engine: Engine, llama: Path, small_disk: Path) -> None:
    """A model of which nothing is known has nothing reserved. What was answered stays so, and only the other's file is left."""
    messages: list[Message] = []

    def report(message: Message) -> None:
        messages.append(message)
        if isinstance(message, BatchDone):
            fill(small_disk)

    order = command(llama, small_disk, KVCacheStrategy.PAGED, kv_bytes_per_token=0, count=2)
    longer = work_row(1, "y" * 900, max_new_tokens=2)  # more tokens of its own than the first has left places for
    engine.execute(replace(order, rows=(order.rows[0], longer)), report, threading.Event())
    assert len(results_of(messages)) == 1
    failure = only(messages, AttemptFailed)
    assert (failure.code, failure.error_type) == ("pass_failed", "OSError")
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
@pytest.mark.parametrize("kv", IN_FILES)
def test_files_take_no_more_than_is_reserved_for_them(
    families: Callable[[str], Path], tmp_path: Path, family: str, kv: KVCacheStrategy
) -> None:
    """From a profile alone it is known what rows of so many tokens take at most, to a page of each row."""
    model = families(family)
    (profile,) = (found for found in inspect_models(model.parent, DigestCache()) if found.path.name == model.name)
    rows, prompt, answer = 3, 150, 200

    def reserved(tokens: int) -> int:
        return kv_file_bytes(profile, kv, rows=rows, tokens=tokens, window_tokens=64)

    with cache_in_files(loaded(model), STRATEGIES[kv], tmp_path, Traffic(), rows=rows, tokens=prompt + answer) as cache:
        feed(loaded(model), cache, rows, prompt, answer)
        taken = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".jsonl")
    a_page = reserved(PAGE_TOKENS) // (3 if kv is KVCacheStrategy.PAGED else 2)
    assert reserved(prompt + answer) - 3 * a_page <= taken <= reserved(prompt + answer)


def test_files_hold_beginnings_that_rows_share(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """One row at a time: a beginning ends in a page, a prompt in another, and an answer goes on. All of it was reserved."""
    beginning, own, answer = 129, 2, 260
    rows = [work_row(index, "a" * (beginning - 1) + letter * own, max_new_tokens=answer) for index, letter in enumerate("bc")]
    order = make_command(llama, rows, passes=(PassId.DISK_CACHE,), kv=KVCacheStrategy.PAGED, cache_dir=tmp_path, micro_batch=1)
    pages: list[int] = []

    def note(message: Message) -> None:
        pages.extend(path.stat().st_size for path in tmp_path.glob("**/layer-*.pages") if isinstance(message, BatchDone))

    engine.execute(order, note, threading.Event())
    a_token, layers = profile_of(llama).kv_bytes_per_token, 2
    promised = kv_file_bytes(profile_of(llama), KVCacheStrategy.PAGED, rows=1, tokens=beginning + own + answer, window_tokens=64)
    assert pages
    assert max(pages) > (beginning + own + answer + PAGE_TOKENS) * a_token // layers, "beginnings are shared"
    assert max(pages) <= promised // layers


def test_an_unknown_profile_reserves_nothing() -> None:
    """What is not known is not guessed."""
    unknown = ModelProfile(name="m", path=PurePosixPath("m"), digest="d")
    assert [kv_file_bytes(unknown, kv, rows=8, tokens=1000, window_tokens=64) for kv in IN_FILES] == [0, 0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_what_is_written_is_released(llama: Path, tmp_path: Path, strategy: FileStrategy) -> None:
    """After the prompt nothing is in memory, then room for the tails and one history of one layer; a resident cache holds all."""
    rows, prompt, a_token = 2, 400, 2 * 2 * 2 * 8 * 4
    module = loaded(llama)
    before = live_bytes()
    resident = PackCache(layers_of(module))
    feed(module, resident, rows, prompt, 0)
    assert live_bytes() - before == rows * prompt * a_token
    resident.close()
    tails = rows * (PAGE_TOKENS + MOST_TRIED_TOKENS + 1) * a_token
    with cache_in_files(module, strategy, tmp_path, Traffic(), rows=rows, tokens=prompt + 5) as cache:
        feed(module, cache, rows, prompt, 0)
        assert live_bytes() == before
    (tmp_path / "again").mkdir()
    with cache_in_files(module, strategy, tmp_path / "again", Traffic(), rows=rows, tokens=prompt + 5) as cache:
        feed(module, cache, rows, prompt, 5)
        assert live_bytes() - before <= tails + (prompt + 5 + PAGE_TOKENS) * a_token // 2


@torch.inference_mode()
def feed(module: Any, cache: PackCache, rows: int, prompt: int, answer: int) -> None:
    """Forward passes of a pack: over prompts of so many tokens, then over each further token."""
    sequences = [TokenSequence(tokens=torch.randint(5, 90, (prompt,)).tolist(), capacity=0) for _ in range(rows)]
    packed = PackedModel(module, torch.device("cpu"))
    with packed.attached(layers_in(module)):
        for step in range(1 + answer):
            pack = Pack()
            for one in sequences:
                pack.add(one, wanted=1, is_prompt=step == 0)
            packed.logits(pack, cache)
            for one in sequences:
                one.cached = len(one.tokens)
                one.tokens.append(7)


def live_bytes() -> int:
    """What all tensors that anybody can reach take, storages that several share counted once."""
    gc.collect()
    storages = (found.untyped_storage() for found in gc.get_objects() if type(found) is Tensor)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
