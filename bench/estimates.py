"""How near are the estimates of memory and time to what a runner really takes? On the CPU, in real runner processes.

Models of a few hundred megabytes with random weights are made once into a temporary folder. For each model and shape of work a
runner is started as a worker starts one and given the plan that the planner makes, in the placement that the ladder chooses with
what is free here. It carries it out twice: the first attempt loads the model, and its seconds are held against a quote from the
device's speed; the second finds the model warm, and its seconds are held against a quote from the first. The larger of both peaks
of memory is held against the placement's estimate: before its first answers a process has not touched all of the weights. Prints
figures and judges none.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from bench.hardware import hardware
from bench.texts import make_tokenizer, words
from ollm_service.core.capabilities import Capabilities, Device
from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import GenerationConfig, KVCacheStrategy, RuntimeConfig
from ollm_service.core.placement import Placement, RowBounds, place
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.rates import MeasuredAttempt, Rate, Run, measured_rate, probed_rate
from ollm_service.core.requirements import requirements_of
from ollm_service.core.resolution import HeldModel
from ollm_service.core.wire import Execute, Finished, Loaded, to_json
from ollm_service.inspection import DigestCache, inspect_models
from workers.app import _runner_environment
from workers.cache_folder import take_folder
from workers.probe import Claims, Probe
from workers.supervisor import Died, RunnerProcess, Spawner

MIB = 1024**2
PATIENCE = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Some rows: the tokens of the longest prompt and of every answer. Padded: the shortest prompt is half as long."""

    rows: int
    prompt: int
    answer: int
    is_padded: bool = True
    is_sampled: bool = False
    kv: KVCacheStrategy = KVCacheStrategy.RESIDENT


SHAPES: Mapping[str, Shape] = {
    "many short rows": Shape(rows=32, prompt=64, answer=24),
    "long prompts": Shape(rows=2, prompt=1024, answer=16, is_padded=False),
    "long answers": Shape(rows=8, prompt=32, answer=128, is_sampled=True),
}
_TEXT: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS: Mapping[str, Any] = {"num_experts_per_tok": 2, "num_hidden_layers": 8}
MODELS: Mapping[str, Callable[[int], Any]] = {
    "llama": lambda size: transformers.LlamaConfig(vocab_size=size, **_TEXT),
    "qwen3-moe": lambda size: transformers.Qwen3MoeConfig(
        vocab_size=size, **{**_TEXT, **_EXPERTS, "num_experts": 8, "moe_intermediate_size": 512}
    ),
    "gpt-oss": lambda size: transformers.GptOssConfig(
        vocab_size=size, **{**_TEXT, **_EXPERTS, "num_local_experts": 8, "intermediate_size": 512, "sliding_window": 128}
    ),
    "gemma3": lambda size: transformers.Gemma3TextConfig(
        vocab_size=size, **{**_TEXT, "num_hidden_layers": 12, "sliding_window": 256}
    ),
    "qwen3-next": lambda size: transformers.Qwen3NextConfig(
        vocab_size=size,
        linear_num_value_heads=8,
        linear_num_key_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        shared_expert_intermediate_size=512,
        **{**_TEXT, **_EXPERTS, "num_experts": 8, "moe_intermediate_size": 512},
    ),
    "gpt2": lambda size: transformers.GPT2Config(
        vocab_size=size, n_embd=768, n_layer=12, n_head=12, n_positions=2048, bos_token_id=None, eos_token_id=None
    ),
    "phi3": lambda size: transformers.Phi3Config(vocab_size=size, **_TEXT),
}
USUAL_MODELS = ("llama", "qwen3-moe", "gpt-oss", "gemma3", "qwen3-next")


def make_model(name: str, folder: Path) -> None:
    """A model of the architecture with random weights, which never ends an answer by itself."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(MODELS[name](len(tokenizer)))  # type: ignore[no-untyped-call]
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One model at one shape. Bytes, and seconds of the first attempt (with loading) and of the second (warm)."""

    model: str
    shape: str
    micro_batch: int
    estimated: int
    measured: int
    parts: Mapping[str, int]
    seconds: float
    quoted: float
    warm_seconds: float
    warm_quoted: float
    figures: Mapping[str, Any]

    @property
    def over(self) -> float:
        """By how much the estimate is above what was measured, as a part of that."""
        return (self.estimated - self.measured) / self.measured


class Bench:
    """One worker's view of this machine, and its models."""

    def __init__(self, root: Path, cache: Path, threads: int) -> None:
        self._root = root
        self._cache = cache
        self._environment = _runner_environment({**os.environ, "OMP_NUM_THREADS": str(threads)})
        self._probe = Probe(Claims(node="bench", slots=1), self._environment)
        self._profiles = {profile.name: profile for profile in inspect_models(root, DigestCache())}
        self._spawner = Spawner()

    def compare(self, name: str, shape_name: str, shape: Shape) -> Comparison:
        """Run it twice in one runner."""
        profile = self._profiles[name]
        capabilities = self._probe.capabilities((profile,), [self._cache], None)
        with self._runner() as runner:
            command = self._command(profile, capabilities, shape)
            first, seconds = _attempt(runner, command)
            device = _with_speed(capabilities.main_device, runner)
            second, warm_seconds = _attempt(runner, command)
        placement = command.placement
        disk_rate = capabilities.cache_disk.read_rate if capabilities.cache_disk else None
        probed = probed_rate(
            profile,
            device,
            Run(
                rows=placement.micro_batch,
                prompt_tokens=shape.prompt,
                tokens=shape.prompt + shape.answer // 2,
                kv=placement.kv_cache_strategy,
                is_sampled=shape.is_sampled,
            ),
            disk_rate=disk_rate,
        )
        seen = MeasuredAttempt(
            placement=to_json(placement), measured=first | {"device": device.name, "backend": command.runtime_plan.backend_id}
        )
        known = measured_rate(
            [seen], device_name=device.name, tier=placement.tier, backend_id=command.runtime_plan.backend_id or ""
        )
        assert probed is not None, "the runner has probed no speed"
        assert known is not None, "the attempt has measured nothing"
        return Comparison(
            model=name,
            shape=shape_name,
            micro_batch=placement.micro_batch,
            estimated=placement.estimate.device_bytes,
            measured=int(max(first["peak_device_bytes"], second["peak_device_bytes"])),
            parts={part: size for part, size in asdict(placement.estimate).items() if size},
            seconds=seconds,
            quoted=probed.load_seconds + quoted_seconds(probed, shape),
            warm_seconds=warm_seconds,
            warm_quoted=quoted_seconds(known, shape),
            figures={"first": first, "second": second},
        )

    @contextmanager
    def _runner(self) -> Iterator[RunnerProcess]:
        runner = RunnerProcess(self._spawner, environment=self._environment)
        runner.start()
        try:
            yield runner
        finally:
            runner.close()

    def _command(self, profile: ModelProfile, capabilities: Capabilities, shape: Shape) -> Execute:
        config = RuntimeConfig(kv_cache_strategy=shape.kv)
        planned = plan(profile.name, [HeldModel(profile=profile, workers=("bench",))], config)
        placed = place(
            planned.plan,
            profile,
            config,
            requirements_of(planned.plan, profile, config),
            capabilities,
            self._probe.live({}, self._cache, None),
            RowBounds(
                longest=shape.prompt + shape.answer,
                longest_prompt=shape.prompt,
                count=shape.rows,
                are_sampled=shape.is_sampled,
            ),
        )
        assert isinstance(placed, Placement), placed
        return Execute(
            plan_id="plan_bench",
            attempt=1,
            model_dir=str(self._root / profile.path),
            cache_dir=str(self._cache),
            runtime_plan=planned.plan,
            profile=profile,
            config=config,
            placement=placed,
            rows=tuple(_row(number, shape) for number in range(shape.rows)),
        )


def _row(number: int, shape: Shape) -> WorkRow:
    generation = GenerationConfig(
        max_new_tokens=shape.answer, temperature=1.0 if shape.is_sampled else 0.0, top_p=0.9 if shape.is_sampled else None, seed=7
    )
    prompt = words(_prompt_tokens(number, shape), number)
    return WorkRow(row=number, custom_id=f"row-{number}", prompt=prompt, messages=None, generation=generation)


def _prompt_tokens(number: int, shape: Shape) -> int:
    return shape.prompt - (number * shape.prompt // (2 * shape.rows) if shape.is_padded else 0)


def _attempt(runner: RunnerProcess, command: Execute) -> tuple[dict[str, Any], float]:
    """What the runner measured, and the seconds from the command to its end."""
    measured: dict[str, Any] = {}
    while runner.speed is None:  # it is sent once torch is there; what comes before is no attempt's time
        message = runner.receive(timeout=0.05)
        if isinstance(message, Died):
            raise SystemExit(f"the runner died: {message.cause}: {' | '.join(message.tail[-3:])}")
    began, process = time.perf_counter(), psutil.Process(runner.pid)
    worked = sum(process.cpu_times()[:2])
    runner.send(command)
    while True:
        message = runner.receive(timeout=PATIENCE)
        match message:
            case Loaded(was_warm=was_warm):
                measured["was_warm"] = was_warm
            case Finished():
                seconds = time.perf_counter() - began
                return measured | dict(message.measured) | {"cpu_seconds": sum(process.cpu_times()[:2]) - worked}, seconds
            case None | Died():
                raise SystemExit(f"the runner did not end: {message}")
            case _ if type(message).__name__ in ("AttemptFailed", "SpecializationFailed"):
                raise SystemExit(f"the attempt failed: {message}")


def _with_speed(device: Device, runner: RunnerProcess) -> Device:
    assert runner.speed is not None
    speed = runner.speed.devices[device.device_id]
    return replace(device, memory_rate=speed.memory_rate, arithmetic=speed.arithmetic)


def quoted_seconds(rate: Rate, shape: Shape) -> float:
    """What a rate says of all rows in one micro-batch, as quotes add it up; how many tokens they answer is known here."""
    prompts = sum(_prompt_tokens(number, shape) for number in range(shape.rows))
    passes = (shape.answer - 1) * rate.pass_seconds_of(shape.rows, is_pessimistic=True)
    return rate.plan_seconds + shape.rows * rate.row_seconds + prompts / rate.prefill + passes


def summary(found: Sequence[Comparison]) -> dict[str, float]:
    """The figures that are judged, and the processor's time besides, which other work on the machine stretches less."""
    worked = [one.figures["first"]["cpu_seconds"] / one.quoted for one in found]
    ratios = [one.seconds / one.quoted for one in found]
    warm = [one.warm_seconds / one.warm_quoted for one in found]
    return {
        "under_max": max(0.0, *(-one.over for one in found)),
        "over_median": statistics.median(one.over for one in found),
        "time_ratio_p50": statistics.median(ratios),
        "time_ratio_p90": _ninth_tenth(ratios),
        "time_ratio_measured_p50": statistics.median(warm),
        "time_ratio_measured_p90": _ninth_tenth(warm),
        "processor_ratio_p50": statistics.median(worked),
        "processor_ratio_p90": _ninth_tenth(worked),
    }


def _ninth_tenth(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def table(found: Sequence[Comparison]) -> Iterator[str]:
    """A line for each comparison."""
    yield (
        f"{'model':<12}{'shape':<18}{'rows':>5}{'estimate':>10}{'measured':>10}{'over':>8}"
        f"{'quoted s':>10}{'took s':>8}{'of CPU':>8}{'again s':>9}{'took s':>8}"
    )
    for one in found:
        yield (
            f"{one.model:<12}{one.shape:<18}{one.micro_batch:>5}{one.estimated / MIB:>10.0f}{one.measured / MIB:>10.0f}"
            f"{one.over:>8.1%}{one.quoted:>10.2f}{one.seconds:>8.2f}{one.figures['first']['cpu_seconds']:>8.2f}"
            f"{one.warm_quoted:>9.2f}{one.warm_seconds:>8.2f}"
        )


def told(one: Comparison) -> str:
    """Every byte of an estimate, in MiB."""
    parts = ", ".join(f"{part} {size / MIB:.1f}" for part, size in one.parts.items())
    return f"{one.model}, {one.shape}: {parts}; measured {one.measured / MIB:.1f}"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line after the table")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=USUAL_MODELS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=tuple(SHAPES))
    parser.add_argument("--kv", choices=("resident", "paged"), default="resident", help="where the KV cache lives")
    parser.add_argument("--rows", type=int, help="so many rows in every shape")
    parser.add_argument("--equal", action="store_true", help="prompts of one length in every shape, so that none is padded")
    parser.add_argument("--choice", choices=("greedy", "sampled"), help="how every shape's rows choose their tokens")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the runner; on a busy machine several wait for each other ten times as long"
    )
    parser.add_argument("--folder", type=Path, help="keep the models here, and use those that are here")
    arguments = parser.parse_args()
    changes: dict[str, Any] = {"kv": KVCacheStrategy(arguments.kv)}
    if arguments.rows:
        changes["rows"] = arguments.rows
    if arguments.equal:
        changes["is_padded"] = False
    if arguments.choice:
        changes["is_sampled"] = arguments.choice == "sampled"
    before = hardware()
    with tempfile.TemporaryDirectory(prefix="ollm-bench-") as temporary:
        root = arguments.folder or Path(temporary) / "models"
        for name in arguments.models:
            if not (root / name / "config.json").exists():
                make_model(name, root)
        folder = take_folder(Path(temporary) / "cache")
        bench = Bench(root, folder.path, arguments.threads)
        found = []
        for name, shape in itertools.product(arguments.models, arguments.shapes):
            found.append(bench.compare(name, shape, replace(SHAPES[shape], **changes)))
            print(list(table(found))[-1], told(found[-1]), sep="\n", file=sys.stderr)
        folder.release()
    for line in table(found):
        print(line, file=sys.stderr if arguments.json else sys.stdout)
    figures = {"hardware": before, **summary(found), "comparisons": [asdict(one) for one in found]}
    print(json.dumps(figures) if arguments.json else json.dumps(summary(found), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
