"""How do rows become the dataclasses that leave the store, and plans become columns?"""

import json
from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from sqlalchemy import Row

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.errors import RequestError
from ollm_service.core.leasing import RowError, WorkRow
from ollm_service.core.lifecycle import ExecutionState, job_state
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.plan import RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements
from ollm_service.core.wire import from_json
from ollm_service.store.views import AttemptView, EventView, JobView, PlanView, ResultView, UnreadablePlan, WorkerView

T = TypeVar("T")
# What decoding raises for what no release of ours has written, or only a newer one.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, RequestError)


def decoded(kind: type[T], text: str) -> T:
    """A value that nobody changes, from its column's text: what many rows share is decoded once. Raises one of UNREADABLE."""
    return cast(T, _decoded(kind, text))  # type: ignore[arg-type]  # a class is hashable


@lru_cache(maxsize=256)
def _decoded(kind: type[Any], text: str) -> Any:
    return from_json(kind, json.loads(text))


def decoded_or_none(kind: type[T], text: str) -> T | None:
    """The same, or None where it cannot be decoded."""
    try:
        return decoded(kind, text)
    except UNREADABLE:
        return None


def shown_columns(plan: RuntimePlan) -> dict[str, Any]:
    """The columns in which `plan_states` shows a RuntimePlan."""
    return {
        "backend_id": plan.backend_id,
        "support_level": plan.support_level.value,
        "specialization_state": plan.specialization_state.value,
        "planned_passes": ",".join(plan.specialization_pass_ids),
        "applied_passes": ",".join(plan.applied_specialization_pass_ids),
        "fallback_reason": plan.fallback_reason,
    }


def job_view(row: Row[Any] | SimpleNamespace, plan_states: Mapping[str, int], finished_ms: int | None) -> JobView:
    """A job, its JSON as text, given how many of its plans are in which state and when the last of them ended."""
    state = job_state(ExecutionState(name) for name in plan_states)
    return JobView(
        job_id=row.id,
        tenant_id=row.tenant_id,
        model=row.model,
        state=state,
        row_count=row.row_count,
        succeeded=row.succeeded,
        failed=row.failed,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        plans_total=row.plans_total,
        priority=row.priority,
        where=row.where_clause,
        config=decoded_or_none(RuntimeConfig, row.config),
        generation=decoded_or_none(GenerationConfig, row.generation),
        retry_of=row.retry_of,
        quoted=None if row.quoted is None else decoded_or_none(dict, row.quoted),
        created_ms=row.created_ms,
        finished_ms=finished_ms if state.is_final else None,
        deadline_ms=row.deadline_ms,
    )


def plan_view(row: Row[Any]) -> PlanView:
    """A plan record, from its columns and its class's `requirements`, JSON as text. Raises one of UNREADABLE."""
    planned = decoded(RuntimePlan, row.planned)
    return PlanView(
        plan_id=row.id,
        job_id=row.job_id,
        number=row.number,
        model=row.model,
        state=ExecutionState(row.state),
        condition=row.condition if row.state == ExecutionState.QUEUED else None,
        class_id=row.class_id,
        row_count=row.row_count,
        rows_done=row.rows_done,
        rows_failed=row.rows_failed,
        runtime_plan=planned if row.finalized is None else decoded(RuntimePlan, row.finalized),
        planned=planned,
        profile=None if row.profile is None else decoded(ModelProfile, row.profile),
        config=decoded(RuntimeConfig, row.config),
        requirements=decoded(Requirements, row.requirements),
        inventory_seq=row.inventory_seq,
        attempt=row.attempt,
        failures=row.failures,
        losses=row.losses,
        declines=row.declines,
        worker_id=row.worker_id,
        node=row.worker_node,
        cancel_requested=row.cancel_requested,
        created_ms=row.created_ms,
        available_ms=row.available_ms,
        started_ms=row.started_ms,
        finished_ms=row.finished_ms,
        reason=row.reason,
    )


def plan_view_if_readable(row: Row[Any]) -> PlanView | UnreadablePlan:
    """The same; one that cannot be decoded must not keep the others from being seen."""
    try:
        return plan_view(row)
    except UNREADABLE as error:
        return UnreadablePlan(plan_id=row.id, error=type(error).__name__)


def event_view(row: Row[Any]) -> EventView:
    """One event."""
    return EventView(
        event_id=row.id,
        plan_id=row.plan_id,
        job_id=row.job_id,
        at_ms=row.at_ms,
        kind=row.kind,
        from_state=row.from_state,
        to_state=row.to_state,
        worker_id=row.worker_id,
        node=row.worker_node,
        reason=row.reason,
    )


def attempt_view(row: Row[Any]) -> AttemptView:
    """One attempt."""
    return AttemptView(
        number=row.number,
        worker_id=row.worker_id,
        node=row.worker_node,
        outcome=row.outcome,
        runtime_plan=None if row.runtime_plan is None else from_json(RuntimePlan, row.runtime_plan),
        placement=row.placement or {},
        measured=row.measured or {},
        started_ms=row.started_ms,
        ended_ms=row.ended_ms,
    )


def result_view(row: Row[Any]) -> ResultView:
    """One result with its row's custom_id."""
    error = None if row.error_code is None else RowError(code=row.error_code, message=row.error_message or "")
    return ResultView(
        row=row.row,
        custom_id=row.custom_id,
        text=row.text,
        finish_reason=row.finish_reason,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        error=error,
        plan_id=row.plan_id,
        attempt=row.attempt,
        cursor=row.seq,
    )


def worker_view(row: Row[Any]) -> WorkerView:
    """One worker, with `running` and `age_ms` counted by the query, JSON as text. Raises one of UNREADABLE."""
    return WorkerView(
        worker_id=row.id,
        node=row.node,
        state=row.state,
        pid=row.pid,
        capabilities=decoded(Capabilities, row.capabilities),
        live=from_json(LiveState, json.loads(row.live)),
        running=row.running_plans,
        warm_model=row.warm_model,
        heartbeat_age_ms=max(0, row.age_ms),
        started_ms=row.started_ms,
    )


def work_row(row: Row[Any], generation: GenerationConfig) -> WorkRow:
    """One row to answer; its own generation settings lie on top of the job's."""
    request: Mapping[str, Any] = row.request
    messages = request.get("messages")
    return WorkRow(
        row=row.row,
        custom_id=row.custom_id,
        prompt=request.get("prompt"),
        messages=None if messages is None else tuple(messages),
        generation=generation.merged_with(request.get("generation") or {}),
    )
