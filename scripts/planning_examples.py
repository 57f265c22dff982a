"""What does each outcome of planning look like? The demo's model is planned, placed and run, and told line by line.

The worker is described here, so that the same is said on every machine; the runner and its passes are real.
"""

import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ollm_service.core.capabilities import CacheDisk, Capabilities, Device, LiveState
from ollm_service.core.finalization import CannotFallBack, fall_back, finalize
from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import GenerationConfig, KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import PassOutcome
from ollm_service.core.placement import Placement, RowBounds, Unplaceable, place
from ollm_service.core.plan import BackendId, PassId, RuntimePlan
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import demanded_passes, requirements_of
from ollm_service.core.resolution import HeldModel
from ollm_service.core.wire import BatchDone, Execute, Message, SpecializationFailed
from ollm_service.inspection import DigestCache, inspect_models
from workers.runner.engine import Engine

MODELS = Path(__file__).parents[1] / "demo" / "models"
MODEL = "sum-chat"
MIB, GIB = 1024**2, 1024**3
QUESTIONS = tuple(f"What is {first}+{first + 7}?" for first in range(10, 42))
ROW_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A title, the options that lead there, and what is free on the worker."""

    title: str
    words: str
    options: Mapping[str, object] = field(default_factory=dict)
    free_bytes: int = 8 * GIB
    has_cache_disk: bool = True


EXAMPLES = (
    Example(
        title="Applied",
        words="The KV cache in files and small chunks were asked for; every planned pass ends once.",
        options={"kv_cache_strategy": "paged", "dense_projection_chunk_rows": 256},
    ),
    Example(
        title="Fallback",
        words="Nothing was asked for. The cache disk is lost after placement: the pass fails, and generic takes over.",
        has_cache_disk=False,
    ),
    Example(
        title="Generic",
        words="Specialization was switched off, so nothing is planned that could fail.",
        options={"use_specialization": False},
    ),
    Example(
        title="Not executable",
        words="No provider of this family moves layers between GPU and CPU: refused before anything is stored.",
        options={"offload_gpu_layers": 2},
    ),
    Example(
        title="Unplaceable",
        words="The plan is sound, but this worker has too little free at the moment: it declines, and the plan waits.",
        free_bytes=420 * MIB,
    ),
)


def examples() -> str:
    """All of them, one below the other."""
    (profile,) = [model for model in inspect_models(MODELS, DigestCache()) if model.name == MODEL]
    engine = Engine()
    return "\n".join(_shown(one, "\n".join(tell(one, profile, engine))) for one in EXAMPLES)


def _shown(example: Example, lines: str) -> str:
    return f"### {example.title}\n\n{example.words}\n\n```\n{lines}\n```\n"


def tell(example: Example, profile: ModelProfile, engine: Engine) -> Iterator[str]:
    """The lines of one example. Runs the model where it can be placed."""
    config = RuntimeConfig.from_dict(example.options)
    made = plan(f"path:{MODEL}", [HeldModel(profile=profile, workers=("w",))], config).plan
    options = " ".join(f"{name}={value}" for name, value in example.options.items())
    yield f"options    {options or 'none'}"
    yield f"backend    {made.backend_id or 'none'}"
    yield f"because    {made.reason}"
    if not made.is_executable():
        return
    placed = _place(example, made, profile, config)
    if isinstance(placed, Unplaceable):
        yield from (f"refused    {tier.device_id}, {tier.tier}: {tier.reason}" for tier in placed.refused)
        return
    yield f"placed     {placed.device_id}, {placed.tier}, {placed.micro_batch} rows at a time"
    ended = _run(example, made, profile, config, placed, engine)
    yield f"ended      {ended.specialization_state}, on {ended.backend_id}"
    for pass_id in ended.specialization_pass_ids:
        detail = f"pass_{pass_id.replace('-', '_')}"
        yield f"           {pass_id}: {ended.details[detail]}"


def _place(example: Example, made: RuntimePlan, profile: ModelProfile, config: RuntimeConfig) -> Placement | Unplaceable:
    worker = Capabilities(
        node="example",
        slots=1,
        devices=(Device(device_id="cpu", name="CPU", memory_bytes=8 * GIB),),
        host_memory_bytes=8 * GIB,
        backends=dict.fromkeys(BackendId),
        passes=dict.fromkeys((PassId.DISK_CACHE, PassId.MLP_CHUNKING)),
        kv_strategies=dict.fromkeys((KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED)),
        models=(profile,),
        cache_disk=CacheDisk(path="/cache", total_bytes=GIB),
    )
    live = LiveState(device_free_bytes={"cpu": example.free_bytes}, host_free_bytes=example.free_bytes, cache_free_bytes=GIB)
    return place(made, profile, config, requirements_of(made, profile, config), worker, live, RowBounds(longest=ROW_TOKENS))


def _run(
    example: Example, made: RuntimePlan, profile: ModelProfile, config: RuntimeConfig, placed: Placement, engine: Engine
) -> RuntimePlan:
    """The plan as it really ran, falling back where it may."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        if example.has_cache_disk:
            cache.mkdir()
        else:
            cache.touch()  # as when a disk is unmounted: there is no folder to be written to
        messages: list[Message] = []
        command = Execute(
            plan_id="plan_example",
            attempt=1,
            model_dir=str(MODELS / MODEL),
            cache_dir=str(cache),
            runtime_plan=made,
            profile=profile,
            config=config,
            placement=placed,
            rows=tuple(_row(number, question) for number, question in enumerate(QUESTIONS)),
        )
        engine.execute(command, messages.append, threading.Event())
    for message in messages:
        if isinstance(message, SpecializationFailed):
            return _fallen(made, config, message.outcomes, message)
        if isinstance(message, BatchDone):
            return finalize(made, message.outcomes, {})
    raise RuntimeError(f"the example did not run: {messages[-1]}")


def _row(number: int, question: str) -> WorkRow:
    return WorkRow(
        row=number,
        custom_id=f"row-{number}",
        prompt=None,
        messages=({"role": "user", "content": question},),
        generation=GenerationConfig(max_new_tokens=4),
    )


def _fallen(
    made: RuntimePlan, config: RuntimeConfig, outcomes: Mapping[PassId, PassOutcome], failed: SpecializationFailed
) -> RuntimePlan:
    fallen = fall_back(
        made, config, outcomes, reason=failed.reason, error_type=failed.error_type, demanded=demanded_passes(made, config)
    )
    if isinstance(fallen, CannotFallBack):
        raise RuntimeError(f"the example may not fall back: {fallen.reason}")
    return fallen
