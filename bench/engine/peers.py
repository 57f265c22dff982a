"""What do others do with the same rows? accelerate with layers on disk, transformers' two ways to generate, and the disk alone.

Each runs in a process of its own and is warmed up before.
"""

import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.engine.made import model_folder
from bench.engine.ours import Measured
from bench.engine.work import Row, batches, work
from workers.runner.weights.extents import CHUNK_BYTES

DISK_ROUNDS = 4


class PassClock:
    """Seconds of each forward pass of a model, and of what is done before each so that its files are read from disk."""

    def __init__(self, model: Any, cold_files: list[Path]) -> None:
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.dropping = 0.0
        self._cold_files = cold_files
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(lambda *_: self.ends.append(time.perf_counter()))

    def _begin(self, _module: Any, _arguments: Any) -> None:
        began = time.perf_counter()
        for file in self._cold_files:
            drop(file)
        self.begins.append(time.perf_counter())
        self.dropping += self.begins[-1] - began

    def seconds(self) -> list[float]:
        """Of each pass so far."""
        return [end - begin for begin, end in zip(self.begins, self.ends, strict=True)]


def accelerated(folder: Path, *, model: str, rows: str, is_quick: bool, at_a_time: int) -> Measured:
    """accelerate's layers on disk and transformers' `generate` in static batches, its files cold before each pass."""
    own = model_folder(folder, model)
    layers = transformers.AutoConfig.from_pretrained(own).num_hidden_layers
    kept = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    with tempfile.TemporaryDirectory() as offload:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            own,
            dtype="auto",
            device_map={**dict.fromkeys(kept, "cpu"), **{f"model.layers.{layer}": "disk" for layer in range(layers)}},
            offload_folder=offload,
        )
        return _static(loaded, own, work(rows, is_quick=is_quick), at_a_time, cold_files=list(own.glob("*.safetensors")))


def generated(folder: Path, *, model: str, rows: str, is_quick: bool, at_a_time: int) -> Measured:
    """The model in memory and transformers' `generate` in static batches."""
    own = model_folder(folder, model)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(own, dtype="auto")
    return _static(loaded, own, work(rows, is_quick=is_quick), at_a_time, cold_files=[])


def _static(model: Any, own: Path, rows: tuple[Row, ...], at_a_time: int, cold_files: list[Path]) -> Measured:
    """Left-padded batches in the order of arrival, each as long as its longest answer."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(own)
    _generate(model, tokenizer, work("warm-up"))
    clock, read, began = PassClock(model, cold_files), bytes_from_disk(), time.perf_counter()
    for batch in batches(rows, at_a_time):
        _generate(model, tokenizer, batch)
    seconds = time.perf_counter() - began - clock.dropping
    passes = clock.seconds()
    steps = passes[1:] if len(rows) <= at_a_time else passes
    return {
        "seconds": seconds,
        "passes": float(len(passes)),
        "step_seconds": statistics.mean(steps),
        "disk_bytes_a_pass": (bytes_from_disk() - read) / len(passes),
    }


def _generate(model: Any, tokenizer: Any, rows: Any) -> None:
    tokens = tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True)
    longest = max(row.answer_tokens for row in rows)
    with torch.inference_mode():
        answers = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
        )
    if answers.shape[1] != tokens["input_ids"].shape[1] + longest:
        raise SystemExit("transformers' generate has ended before its limit")


def continuous(folder: Path, *, model: str, rows: str, is_quick: bool) -> Measured:
    """The model in memory and what `generate_batch` is made of, which lets rows have limits of their own."""
    own = model_folder(folder, model)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(own)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(own, dtype="auto", attn_implementation="sdpa")
    found = work(rows, is_quick=is_quick)
    options = transformers.GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(row.answer_tokens for row in found)
    )
    with torch.inference_mode(), loaded.continuous_batching_context_manager(generation_config=options, timeout=5) as manager:
        _answer_all(manager, tokenizer, work("warm-up"))
        began = time.perf_counter()
        _answer_all(manager, tokenizer, found)
        seconds = time.perf_counter() - began
    return {"seconds": seconds}


def _answer_all(manager: Any, tokenizer: Any, rows: tuple[Row, ...]) -> None:
    """Raises SystemExit where a row does not get the tokens that it was to get."""
    limits = {
        manager.add_request(tokenizer(row.prompt)["input_ids"], max_new_tokens=row.answer_tokens): row.answer_tokens
        for row in rows
    }
    while limits:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise SystemExit("transformers' continuous batching has ended before its rows")
        elif result.is_finished():
            limit = limits.pop(result.request_id)
            if len(result.generated_tokens) != limit:
                raise SystemExit(f"continuous batching gave {len(result.generated_tokens)} of {limit} tokens: {result.error}")


def disk(folder: Path, *, model: str) -> Measured:
    """Bytes a second of one thread that reads the extents from one end to the other, in the engine's blocks."""
    path = next((folder / model / "weights").glob("*/weights.extents"))
    drop(path)
    file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    buffer, read, began = mmap.mmap(-1, CHUNK_BYTES), 0, time.perf_counter()
    for _ in range(DISK_ROUNDS):
        at = 0
        while count := os.preadv(file, [buffer], at):
            at += count
        read += at
    seconds = time.perf_counter() - began
    os.close(file)
    return {"bytes_a_second": read / seconds}


def bytes_from_disk() -> int:
    """What this process has had to fetch from the disk so far, also through mapped files: shows that passes were cold."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"])


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
