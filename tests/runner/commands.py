"""What does a supervisor send, and what did the runner answer? Commands for tests, and the messages they led to."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ollm_service.core.estimates import MemoryEstimate
from ollm_service.core.leasing import RowResult, WorkRow
from ollm_service.core.options import GenerationConfig, KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import PassOutcome
from ollm_service.core.placement import Placement, Tier
from ollm_service.core.plan import (
    BackendId,
    CapabilityProfile,
    GenericModelKind,
    ModelSourceKind,
    PassId,
    ResolvedModel,
    RuntimePlan,
    SpecializationState,
    SupportLevel,
)
from ollm_service.core.profile import ModelProfile
from ollm_service.core.wire import BatchDone, Execute, Message
from workers.runner.engine import Engine

M = TypeVar("M")
_NOTHING = MemoryEstimate(weights=0, kv=0, activations=0, logits=0, workspace=0, disk=0)


def work_row(row: int, prompt: str | None = None, **generation: object) -> WorkRow:
    """A row with a raw prompt."""
    return WorkRow(
        row=row, custom_id=f"row-{row}", prompt=prompt, messages=None, generation=GenerationConfig.from_dict(generation)
    )


def chat_row(row: int, *contents: object, **generation: object) -> WorkRow:
    """A row with one user message for each content."""
    messages = tuple({"role": "user", "content": content} for content in contents)
    return WorkRow(
        row=row, custom_id=f"row-{row}", prompt=None, messages=messages, generation=GenerationConfig.from_dict(generation)
    )


def make_plan(name: str, passes: Sequence[PassId], chunk_rows: int | None) -> RuntimePlan:
    """A generic plan, or a native one where passes are planned."""
    is_native = bool(passes)
    details = {"mlp_chunking_mode": "explicit-rows" if chunk_rows else "adaptive-headroom"}
    if chunk_rows:
        details["mlp_chunking_max_rows"] = str(chunk_rows)
    return RuntimePlan(
        resolved_model=ResolvedModel(
            reference=name,
            source_kind=ModelSourceKind.LOCAL_PATH,
            normalized_name=name,
            capabilities=CapabilityProfile(support_level=SupportLevel.GENERIC),
            resolution_message="for a test",
        ),
        backend_id=BackendId.OPTIMIZED_NATIVE if is_native else BackendId.TRANSFORMERS_GENERIC,
        model_path=PurePosixPath(name),
        support_level=SupportLevel.OPTIMIZED if is_native else SupportLevel.GENERIC,
        generic_model_kind=GenericModelKind.CAUSAL_LM,
        supports_disk_cache=PassId.DISK_CACHE in passes,
        supports_cpu_offload=False,
        supports_gpu_offload=False,
        specialization_enabled=is_native,
        specialization_applied=False,
        specialization_provider_id="llama-native" if is_native else None,
        specialization_state=SpecializationState.PLANNED if is_native else SpecializationState.NOT_PLANNED,
        reason="for a test",
        specialization_pass_ids=tuple(passes),
        details=details if is_native else {},
    )


def make_command(
    model_dir: Path,
    rows: Sequence[WorkRow],
    *,
    passes: Sequence[PassId] = (),
    micro_batch: int = 8,
    kv: KVCacheStrategy = KVCacheStrategy.RESIDENT,
    chunk_rows: int | None = None,
    cache_dir: Path | None = None,
    disk_layers: tuple[int, ...] = (),
    vocabulary_on_disk: bool = False,
) -> Execute:
    """Execute these rows on the CPU."""
    return Execute(
        plan_id="plan_test",
        attempt=1,
        model_dir=str(model_dir),
        cache_dir=None if cache_dir is None else str(cache_dir),
        runtime_plan=make_plan(model_dir.name, passes, chunk_rows),
        profile=ModelProfile(
            name=model_dir.name, path=PurePosixPath(model_dir.name), digest=hashlib.sha256(str(model_dir).encode()).hexdigest()
        ),
        config=RuntimeConfig(),
        placement=Placement(
            device_id="cpu",
            tier=Tier.LAYERS_FROM_DISK if disk_layers else Tier.ALL_ON_DEVICE,
            kv_cache_strategy=kv,
            micro_batch=micro_batch,
            estimate=_NOTHING,
            disk_layers=disk_layers,
            vocabulary_on_disk=vocabulary_on_disk,
        ),
        rows=tuple(rows),
        weights_dir=None if cache_dir is None else str(cache_dir / "weights"),
    )


def run(engine: Engine, command: Execute) -> list[Message]:
    """Every message that the command led to."""
    messages: list[Message] = []
    engine.execute(command, messages.append, threading.Event())
    return messages


def answers(engine: Engine, command: Execute) -> dict[int, RowResult]:
    """The result of each row."""
    return results_of(run(engine, command))


def results_of(messages: Sequence[Message]) -> dict[int, RowResult]:
    """The results in these messages, by row; each row at most once."""
    results = [result for message in of_kind(messages, BatchDone) for result in message.results]
    assert len({result.row for result in results}) == len(results), "a row was answered twice"
    return {result.row: result for result in results}


def texts(engine: Engine, command: Execute) -> dict[int, str | None]:
    """The text of each row."""
    return {row: result.text for row, result in answers(engine, command).items()}


def of_kind(messages: Sequence[Message], kind: type[M]) -> list[M]:
    """The messages of one kind, in order."""
    return [message for message in messages if isinstance(message, kind)]


def only(messages: Sequence[Message], kind: type[M]) -> M:
    """The one message of that kind."""
    (message,) = of_kind(messages, kind)
    return message


def first_outcomes(messages: Sequence[Message]) -> Mapping[PassId, PassOutcome]:
    """How the passes had ended with the first results."""
    return of_kind(messages, BatchDone)[0].outcomes
