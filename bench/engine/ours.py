"""What does our engine do with some rows? In a process of its own, warmed up before."""

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from bench.engine.made import model_folder
from bench.engine.work import Row, work
from ollm_service.core.estimates import estimate_memory
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
from workers.runner.memory import give_back_what_is_freed

Measured = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What our engine is to do: rows by the name of their work, so many at a time, after others that warm it up.

    Every layer comes from disk, or all of the model is in memory. Tokens are guessed only with `tries_ahead`, since random
    weights repeat themselves as no real model does.
    """

    model: str
    rows: str
    at_a_time: int
    warm_up: str | None = "warm-up"
    is_streamed: bool = True
    is_vocabulary_on_disk: bool = False
    is_paged: bool = False
    tries_ahead: bool = False


def ours(folder: Path, setting: Setting, *, is_quick: bool = False) -> Measured:
    """Sizes in bytes, times in seconds. Raises SystemExit where anything fails.

    Peaks are of the warm-up, too: a process that has just begun has not touched all of its memory.
    """
    give_back_what_is_freed()
    (profile,) = inspect_models(folder / setting.model / "models", DigestCache())
    found = work(setting.rows, is_quick=is_quick)
    layout = Layout(
        disk_layers=tuple(range(profile.layer_count)) if setting.is_streamed else (),
        is_sampled=False,
        is_packed=True,
        vocabulary_on_disk=setting.is_vocabulary_on_disk,
        kv=KVCacheStrategy.PAGED if setting.is_paged else KVCacheStrategy.RESIDENT,
    )
    placement = _placement(profile, layout, found, setting.at_a_time)
    engine = Engine(tries_ahead=setting.tries_ahead)
    warm: Measured = {}
    if setting.warm_up is not None:
        _, warm = _run(engine, _command(folder, profile, placement, work(setting.warm_up)))
    began = time.perf_counter()
    results, measured = _run(engine, _command(folder, profile, placement, found))
    seconds = time.perf_counter() - began
    known = [(row.expected, result.text) for row, result in zip(found, results, strict=True) if row.expected is not None]
    return {
        **measured,
        "seconds": seconds,
        "step_seconds": measured["decode_seconds"] / max(1.0, measured["decode_passes"]),
        "peak_bytes": max(measured["peak_device_bytes"], warm.get("peak_device_bytes", 0.0)),
        "peak_process_bytes": max(measured["peak_host_bytes"], warm.get("peak_host_bytes", 0.0)),
        "estimated_bytes": float(placement.estimate.device_bytes),
        "model_bytes": float(profile.weight_bytes),
        "layer_bytes": float(sum(profile.layer_bytes)),
        "answer_tokens": float(sum(result.completion_tokens for result in results)),
        "right_answers": float(sum(expected == text for expected, text in known)),
    }


def _placement(profile: ModelProfile, layout: Layout, rows: tuple[Row, ...], at_a_time: int) -> Placement:
    prompt = max(len(row.prompt.split()) for row in rows)
    tokens = prompt + max(row.answer_tokens for row in rows)
    if layout.disk_layers:
        tier = Tier.LAYERS_FROM_DISK
    else:
        tier = Tier.ALL_ON_DEVICE if layout.kv is KVCacheStrategy.RESIDENT else Tier.KV_IN_FILES
    return Placement(
        device_id="cpu",
        tier=tier,
        kv_cache_strategy=layout.kv,
        micro_batch=at_a_time,
        estimate=estimate_memory(profile, layout, rows=min(at_a_time, len(rows)), tokens=tokens, prompt_tokens=prompt),
        disk_layers=layout.disk_layers,
        vocabulary_on_disk=layout.vocabulary_on_disk,
    )


def _command(folder: Path, profile: ModelProfile, placement: Placement, rows: tuple[Row, ...]) -> Execute:
    config = RuntimeConfig(kv_cache_strategy=placement.kv_cache_strategy)
    return Execute(
        plan_id="plan_bench",
        attempt=1,
        model_dir=str(model_folder(folder, profile.name)),
        cache_dir=str(folder / profile.name / "cache"),
        weights_dir=str(folder / profile.name / "weights"),
        runtime_plan=plan(profile.name, [HeldModel(profile=profile, workers=("bench",))], config).plan,
        profile=replace(profile, path=PurePosixPath(profile.path)),
        config=config,
        placement=placement,
        rows=tuple(
            WorkRow(
                row=number,
                custom_id=str(number),
                prompt=row.prompt,
                messages=None,
                generation=GenerationConfig(max_new_tokens=row.answer_tokens),
            )
            for number, row in enumerate(rows)
        ),
    )


def _run(engine: Engine, command: Execute) -> tuple[list[RowResult], Measured]:
    """The results in the order of the rows, and what was measured. Raises SystemExit where anything failed."""
    messages: list[Message] = []
    engine.execute(command, messages.append, threading.Event())
    last = messages[-1]
    if not isinstance(last, Finished):
        raise SystemExit(f"the engine did not finish: {last}")
    results = [result for message in messages if isinstance(message, BatchDone) for result in message.results]
    failed = next((result for result in results if result.error is not None), None)
    if failed is not None:
        raise SystemExit(f"row {failed.row} failed: {failed.error}")
    return sorted(results, key=lambda result: result.row), dict(last.measured)
