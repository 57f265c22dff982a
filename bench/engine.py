"""How fast is the engine beside its peers, with a model of which no layer stays in memory?

Makes a random Llama of about 1.2 GB, and runs pairs, one engine right after the other, each in a process of its own: ours, and
accelerate with its layers on disk and transformers' `generate`. Streamed cold: the page cache of the files that accelerate reads
is dropped before each of its passes; ours reads past the page cache. The disk's own rate is probed in every pair with the same
block size. Figures are medians over the pairs; `--json` prints one object.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers

from bench.estimates import make_tokenizer, words
from ollm_service.core.estimates import estimate_memory
from ollm_service.core.layout import Layout
from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import GenerationConfig, KVCacheStrategy, RuntimeConfig
from ollm_service.core.placement import Placement, Tier
from ollm_service.core.planning import plan
from ollm_service.core.resolution import HeldModel
from ollm_service.core.wire import Execute, Finished, Message
from ollm_service.inspection import DigestCache, inspect_models
from workers.runner.engine import Engine
from workers.runner.weights.extents import CHUNK_BYTES

MODEL = "llama-1b"
PROMPT = 128
# Rows, new tokens and pairs of each comparison.
SHAPES = {"b1": (1, 16, 5), "b32": (32, 8, 5), "b256": (256, 4, 3)}
SHORT_PROMPT = 32  # of 256 rows


def make_model(folder: Path) -> None:
    """A Llama of about 1.2 GB with random weights, in the widest type that this processor computes fast in."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    dtype, layers = (torch.bfloat16, 11) if _has_fast_bfloat16() else (torch.float32, 5)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)


def _has_fast_bfloat16() -> bool:
    """Whether products in bfloat16 are at least as fast as in float32; without instructions for it they are far slower."""

    def seconds(dtype: torch.dtype) -> float:
        one, other = torch.randn(128, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        one @ other
        began = time.perf_counter()
        for _ in range(5):
            one @ other
        return time.perf_counter() - began

    return seconds(torch.bfloat16) <= seconds(torch.float32)


# ---------------------------------------------------------------------------------------- what runs in a process of its own


def ours(root: Path, rows: int, prompt: int, answer: int) -> dict[str, float]:
    """The engine, with every layer from disk; seconds of the prompt's pass and of one token's."""
    (profile,) = inspect_models(root, DigestCache())
    config = RuntimeConfig()
    planned = plan(profile.name, [HeldModel(profile=profile, workers=("bench",))], config).plan
    layers = tuple(range(profile.layer_count))
    estimate = estimate_memory(
        profile,
        Layout(disk_layers=layers, is_sampled=False, is_packed=True),
        rows=rows,
        tokens=prompt + answer,
        prompt_tokens=prompt,
    )
    command = Execute(
        plan_id="plan_bench",
        attempt=1,
        model_dir=str(root / profile.path),
        cache_dir=str(root.parent / "cache"),
        weights_dir=str(root.parent / "weights"),
        runtime_plan=planned,
        profile=replace(profile, path=PurePosixPath(profile.path)),
        config=config,
        placement=Placement(
            device_id="cpu",
            tier=Tier.LAYERS_FROM_DISK,
            kv_cache_strategy=KVCacheStrategy.RESIDENT,
            micro_batch=rows,
            estimate=estimate,
            disk_layers=layers,
        ),
        rows=tuple(
            WorkRow(
                row=row,
                custom_id=str(row),
                prompt=words(prompt, row),
                messages=None,
                generation=GenerationConfig(max_new_tokens=answer),
            )
            for row in range(rows)
        ),
    )
    messages: list[Message] = []
    Engine().execute(command, messages.append, threading.Event())
    last = messages[-1]
    assert isinstance(last, Finished), last
    measured = last.measured
    passes = measured["layers_brought"] / profile.layer_count
    return {
        "prefill": measured["prefill_seconds"],
        "step": measured["decode_seconds"] / measured["decode_passes"],
        "bytes_a_pass": measured["weight_bytes_read"] / passes,
        "peak_bytes": measured["peak_device_bytes"],
        "estimated_bytes": float(estimate.device_bytes),
        "model_bytes": float(profile.weight_bytes),
    }


def accelerated(root: Path, rows: int, prompt: int, answer: int) -> dict[str, float]:
    """accelerate's layers on disk and transformers' generate, its files dropped from the page cache before each pass."""
    folder = root / MODEL
    layers = transformers.AutoConfig.from_pretrained(folder).num_hidden_layers
    kept = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    with tempfile.TemporaryDirectory() as offload:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map={**dict.fromkeys(kept, "cpu"), **{f"model.layers.{layer}": "disk" for layer in range(layers)}},
            offload_folder=offload,
        )
        tokens = make_tokenizer()([words(prompt, row) for row in range(rows)], return_tensors="pt")
        ends, begins = [], []

        def begin(_module: Any, _arguments: Any) -> None:
            for file in folder.glob("*.safetensors"):
                drop(file)
            begins.append(time.perf_counter())

        model.register_forward_pre_hook(begin)
        model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
        with torch.inference_mode():
            model.generate(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                max_new_tokens=answer,
                min_new_tokens=answer,
                do_sample=False,
            )
    seconds = [end - began for began, end in zip(begins, ends, strict=True)]
    return {"prefill": seconds[0], "step": statistics.mean(seconds[1:])}


def disk(root: Path) -> dict[str, float]:
    """Bytes a second of one thread that reads the extents from one end to the other, in the engine's blocks."""
    path = next((root.parent / "weights").glob("*/weights.extents"))
    drop(path)
    file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    buffer, at, began = mmap.mmap(-1, CHUNK_BYTES), 0, time.perf_counter()
    while count := os.preadv(file, [buffer], at):
        at += count
    return {"rate": at / (time.perf_counter() - began)}


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


# ---------------------------------------------------------------------------------------- the comparison


def child(what: str, root: Path, *numbers: int) -> dict[str, float]:
    """Run one of the above in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine", "--child", what, str(root), *map(str, numbers)],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(root: Path, name: str, pairs: int) -> list[dict[str, Any]]:
    """Pairs of one shape, each with the disk's rate beside it."""
    rows, answer, _ = SHAPES[name]
    prompt = SHORT_PROMPT if rows > 32 else PROMPT
    found = []
    for number in range(pairs):
        pair = {
            "ours": child("ours", root, rows, prompt, answer),
            "disk": child("disk", root),
            "accelerate": child("accelerate", root, rows, prompt, answer),
        }
        found.append(pair)
        ratio = pair["accelerate"]["step"] / pair["ours"]["step"]
        print(
            f"{name} pair {number + 1}: {pair['ours']['step']:.2f} s for a token of {rows} rows, "
            f"accelerate {pair['accelerate']['step']:.2f} ({ratio:.2f}x), disk {pair['disk']['rate'] / 1e9:.2f} GB/s",
            file=sys.stderr,
        )
    return found


def summary(found: dict[str, Sequence[dict[str, Any]]]) -> dict[str, float]:
    """The figures, each the median over its pairs."""

    def median(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(float(value(pair)) for pair in found[name])

    figures = {
        f"streamed_decode_vs_accelerate_{name}": median(name, lambda pair: pair["accelerate"]["step"] / pair["ours"]["step"])
        for name in found
    }
    if "b1" in found:
        figures["streamed_fraction_of_disk"] = median(
            "b1", lambda pair: pair["ours"]["bytes_a_pass"] / pair["ours"]["step"] / pair["disk"]["rate"]
        )
        figures["streamed_peak_over_model_bytes"] = median(
            "b1", lambda pair: pair["ours"]["peak_bytes"] / pair["ours"]["model_bytes"]
        )
        figures["streamed_estimate_over_peak"] = median(
            "b1", lambda pair: pair["ours"]["estimated_bytes"] / pair["ours"]["peak_bytes"]
        )
    return figures


def main() -> None:
    """Run the comparison, or one part of it for the process that compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pairs", type=int, help="pairs of each shape instead of 5, and 3 of 256 rows")
    parser.add_argument("--folder", type=Path, help="where the files go, and stay; a temporary one unless given")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, root, *numbers = given.child
        parts: dict[str, Any] = {"ours": ours, "accelerate": accelerated, "disk": disk}
        print(json.dumps(parts[what](Path(root), *map(int, numbers))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = (given.folder or Path(temporary)) / "models"
        if not (root / MODEL / "config.json").is_file():
            make_model(root)
        child("ours", root, 1, 2, 2)  # lays the weights out
        os.sync()
        load = os.getloadavg()[0]
        found = {name: compare(root, name, given.pairs or SHAPES[name][2]) for name in given.shapes}
        dtype = transformers.AutoConfig.from_pretrained(root / MODEL).dtype
    hardware = {"cores": os.cpu_count(), "load_before": load, "torch": torch.__version__, "dtype": str(dtype)}
    figures = summary(dict(found))
    if given.json:
        print(json.dumps({"hardware": hardware, **figures, "pairs": found}))
    else:
        for name, value in figures.items():
            print(f"{name:40} {value:.2f}")


if __name__ == "__main__":
    main()
