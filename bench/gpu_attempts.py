"""How are attempts on a card timed, with which model and which rows, and how are transformers' and accelerate's own?

Needs torch, transformers, safetensors and accelerate, and nothing else.
"""

import gc
import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from ollm_service.core.estimates import MemoryEstimate, estimate_memory
from ollm_service.core.layout import Layout
from ollm_service.core.leasing import RowResult, WorkRow
from ollm_service.core.options import GenerationConfig, KVCacheStrategy, RuntimeConfig
from ollm_service.core.placement import Placement, Tier
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.resolution import HeldModel
from ollm_service.core.wire import BatchDone, Execute, Finished, Message
from ollm_service.inspection import DigestCache, inspect_models
from workers.runner.engine import Engine

MIB = 1024**2
Where = tuple[tuple[int, ...], tuple[int, ...]]  # the layers in host memory, and those on disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured, by the card's memory."""

    copies: Sequence[int]
    square: int
    hidden: int
    layers: int
    vocabulary: int
    batches: Sequence[int]
    prompt: int
    answer: int
    job_rows: int
    job_batch: int
    shared: int
    repeats: int

    @classmethod
    def of(cls, memory: int) -> "Sizes":
        """For a card of so many bytes: a model of an eighth of it, of 3.4 GB at most, and batches of up to 512 rows."""
        hidden = 4096 if memory >= 12 * 1024**3 else 2048
        layer = 2 * (4 * hidden**2 + 3 * hidden * 11 * hidden // 4)
        layers = max(2, min(8, memory // 8 // layer))
        batches = [1, 8, 32, 128, 256, 512] if memory >= 12 * 1024**3 else [1, 8, 32, 128]
        return cls(
            copies=[size * MIB for size in (1, 4, 16, 64, 256)],
            square=8192 if memory >= 12 * 1024**3 else 4096,
            hidden=hidden,
            layers=layers,
            vocabulary=32_000,
            batches=batches,
            prompt=16,
            answer=8,
            job_rows=96,
            job_batch=32,
            shared=256,
            repeats=5,
        )


class Bench:
    """One device, one folder, and what was found so far. `until` is a time of the monotonic clock."""

    def __init__(self, device: torch.device, sizes: Sizes, root: Path, until: float) -> None:
        self.device = device
        self.sizes = sizes
        self.root = root
        self.until = until
        self.runtime: Any = torch.get_device_module(device)
        self.found: dict[str, Any] = {"left_out": []}

    def part(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure a part unless it is too late, and give its memory back. One that fails is named with its error."""
        if time.monotonic() > self.until:
            self.found["left_out"].append(f"{name}: no time left")
            return
        began = time.monotonic()
        try:
            self.found[name] = measure()
        except Exception as error:  # noqa: BLE001 - what a peer raises must not cost the figures of the others
            said = (str(error).splitlines() or [""])[0][:200]
            self.found["left_out"].append(f"{name}: {type(error).__name__}: {said}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median of a few runs, with nothing else on the device."""
        work()
        taken = []
        for _ in range(self.sizes.repeats):
            self.runtime.synchronize(self.device)
            began = time.perf_counter()
            work()
            self.runtime.synchronize(self.device)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)


# ---------------------------------------------------------------------------------------- the engine


def make_model(folder: Path, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
    """A Llama with random weights, made on the device, which never ends an answer by itself. Each word is a token."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", *(f"w{n}" for n in range(1, sizes.vocabulary))])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")  # type: ignore[no-untyped-call]
    made.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=11 * sizes.hidden // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 128,
        num_key_value_heads=max(1, sizes.hidden // 512),
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)


def profile_of(folder: Path) -> ModelProfile:
    """What inspection says of the one model in the folder."""
    (profile,) = inspect_models(folder, DigestCache())
    return profile


def text(sizes: Sizes, count: int, seed: int) -> str:
    """So many words, from all over the vocabulary."""
    chance = random.Random(seed)
    return " ".join(f"w{chance.randrange(1, sizes.vocabulary)}" for _ in range(count))


def order(bench: Bench, folder: Path, rows: Sequence[tuple[str, int]], batch: int, where: Where) -> Execute:
    """Answer these prompts with so many tokens each, so many rows at a time, with the layers there."""
    profile, (in_host, on_disk), config = profile_of(folder), where, RuntimeConfig()
    layout = Layout(
        device_kind=bench.device.type, host_layers=in_host, disk_layers=on_disk, is_sampled=False, is_packed=True, mlp_rows=None
    )
    prompts = [len(prompt.split()) for prompt, _ in rows]
    longest = max(prompt + answer for prompt, (_, answer) in zip(prompts, rows, strict=True))
    estimate: MemoryEstimate = estimate_memory(profile, layout, rows=batch, tokens=longest, prompt_tokens=max(prompts))
    return Execute(
        plan_id="plan_bench",
        attempt=1,
        model_dir=str(folder / profile.path),
        cache_dir=str(bench.root / "cache"),
        weights_dir=str(bench.root / "weights"),
        runtime_plan=plan(profile.name, [HeldModel(profile=profile, workers=("bench",))], config).plan,
        profile=profile,
        config=config,
        placement=Placement(
            device_id="cpu" if bench.device.type == "cpu" else str(bench.device),
            tier=Tier.LAYERS_FROM_DISK if on_disk else Tier.LAYERS_IN_HOST if in_host else Tier.ALL_ON_DEVICE,
            kv_cache_strategy=KVCacheStrategy.RESIDENT,
            micro_batch=batch,
            estimate=estimate,
            host_layers=in_host,
            disk_layers=on_disk,
        ),
        rows=tuple(
            WorkRow(
                row=number,
                custom_id=str(number),
                prompt=prompt,
                messages=None,
                generation=GenerationConfig(max_new_tokens=answer),
            )
            for number, (prompt, answer) in enumerate(rows)
        ),
    )


def run(engine: Engine, asked: Execute) -> tuple[Mapping[str, float], dict[int, RowResult]]:
    """What an attempt measured, and its answers. Raises RuntimeError where it did not finish."""
    messages: list[Message] = []
    engine.execute(asked, messages.append, threading.Event())
    last = messages[-1]
    if not isinstance(last, Finished):
        raise RuntimeError(f"the attempt ended with {last}")
    return last.measured, {found.row: found for one in messages if isinstance(one, BatchDone) for found in one.results}


def places(sizes: Sizes) -> dict[str, Where]:
    """Where the layers are."""
    every = tuple(range(sizes.layers))
    return {"resident": ((), ()), "from_host": (every, ()), "from_disk": ((), every)}


def steps(bench: Bench, folder: Path, batches: Sequence[int], place: str, copying: float) -> list[dict[str, float]]:
    """Seconds of one token of every row, as long as there is time. `copying`: of all layers at the rate of the largest copy."""
    sizes, engine = bench.sizes, Engine(tries_ahead=False)  # each pass then gives every row one token
    found: list[dict[str, float]] = []
    for batch in batches:
        if found and time.monotonic() > bench.until:
            break
        rows = [(text(sizes, sizes.prompt, row), sizes.answer) for row in range(batch)]
        asked = order(bench, folder, rows, batch, places(sizes)[place])
        run(engine, asked)  # loads, and sets up what the first pass of a shape does
        measured, _ = run(engine, asked)
        seconds = measured["decode_seconds"] / measured["decode_passes"]
        found.append(
            {
                "rows": batch,
                "step": seconds,
                "tokens_per_second": measured["decode_tokens"] / measured["decode_seconds"],
                "copy": copying,
                "peak_device_bytes": measured["peak_device_bytes"],
                "estimated_device_bytes": float(asked.placement.estimate.device_bytes),
            }
        )
    return found


def against_bounds(streamed: Sequence[Mapping[str, float]], resident: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Each streamed step over the longer of copying alone and computing alone, which no step can be faster than."""
    computing = {row["rows"]: row["step"] for row in resident}
    return [
        {"rows": row["rows"], "step_over_longer_of_both": row["step"] / max(row["copy"], computing[row["rows"]])}
        for row in streamed
        if row["rows"] in computing
    ]


# ---------------------------------------------------------------------------------------- a whole job, and its peers


def job(sizes: Sizes) -> list[tuple[str, int]]:
    """Rows with a beginning in common, log-normal parts of their own (median 32, sigma 0.8) and answers (12, 0.8)."""
    chance, shared = random.Random(1), text(sizes, sizes.shared, 0)

    def length(median: float, most: int) -> int:
        return min(most, max(1, round(median * math.exp(chance.gauss(0, 0.8)))))

    return [(f"{shared} {text(sizes, length(32, 256), 7 + row)}", length(12, 96)) for row in range(sizes.job_rows)]


def ours(bench: Bench, folder: Path, place: str) -> float:
    """Seconds of the job, the model warm. No guesses: random weights repeat themselves as no real model does."""
    engine = Engine(tries_ahead=False)
    asked = order(bench, folder, job(bench.sizes), bench.sizes.job_batch, places(bench.sizes)[place])
    run(engine, asked)
    began = time.perf_counter()
    run(engine, asked)
    return time.perf_counter() - began


def loaded(bench: Bench, folder: Path, *, is_offloaded: bool) -> tuple[Any, Any]:
    """transformers' model and tokenizer; offloaded: accelerate keeps its layers in host memory."""
    path = folder / profile_of(folder).path
    kept = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), str(bench.device))
    layers = {f"model.layers.{layer}": "cpu" if is_offloaded else str(bench.device) for layer in range(bench.sizes.layers)}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map={**kept, **layers})
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    return model, tokenizer


def static_batches(bench: Bench, folder: Path, *, is_offloaded: bool) -> float:
    """Seconds of the job with `generate`, in batches in the order of arrival, each as long as its longest row."""
    rows, size = job(bench.sizes), bench.sizes.job_batch
    model, tokenizer = loaded(bench, folder, is_offloaded=is_offloaded)

    @torch.inference_mode()
    def answer(batch: Sequence[tuple[str, int]], most: int) -> None:
        given = tokenizer([prompt for prompt, _ in batch], return_tensors="pt", padding=True).to(bench.device)
        model.generate(input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=most, do_sample=False)

    answer(rows[:size], 2)
    began = time.perf_counter()
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        answer(batch, max(most for _, most in batch))
    bench.runtime.synchronize(bench.device)
    return time.perf_counter() - began


def continuous_batch(bench: Bench, folder: Path) -> float:
    """Seconds of the job with transformers' continuous batching, the model on the device, each row with its own length."""
    rows, (model, tokenizer) = job(bench.sizes), loaded(bench, folder, is_offloaded=False)
    config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=-1, do_sample=False)  # type: ignore[no-untyped-call]
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        answered(manager, tokenizer, rows[:4])
        began = time.perf_counter()
        answered(manager, tokenizer, rows)
        return time.perf_counter() - began


def answered(manager: Any, tokenizer: Any, rows: Sequence[tuple[str, int]]) -> None:
    """Wait for all rows. Raises RuntimeError where the manager stops."""
    for prompt, most in rows:
        manager.add_request(tokenizer(prompt)["input_ids"], max_new_tokens=most, eos_token_id=-1)
    left = len(rows)
    while left:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            left -= 1
        elif not manager.is_running():
            raise RuntimeError("continuous batching has stopped")


def equal_tokens(bench: Bench, folder: Path) -> dict[str, float]:
    """The part of rows of the job that get the text of the resident model, by where the layers are; 1 is promised in float32."""
    texts = {}
    for name, where in places(bench.sizes).items():
        _, answers = run(Engine(), order(bench, folder, job(bench.sizes), bench.sizes.job_batch, where))
        texts[name] = {row: answer.text for row, answer in answers.items()}
    alike = {
        name: statistics.mean(float(found[row] == answer) for row, answer in texts["resident"].items())
        for name, found in texts.items()
    }
    return {name: alike[name] for name in alike if name != "resident"}
