"""How does an explanation look on the wire: what stands in a plan's way, and what each worker says to it?"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from ollm_service.api.shapes import PlanDetailBody, VerdictBody, iso, plan_detail_body
from ollm_service.coordinator.explaining import Explanation, JobExplanation, Offer, Standing
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.wire import to_json
from ollm_service.store.views import PlanDetail

PLANS_NAMED = 100


class StandingBody(VerdictBody):
    """What one worker says to a plan. `eligible` and `reasons` are about what it offers, the rest about what it has free.

    `refused` names the tiers that have no room for the longest row, with the bytes that one row needs and those that are free.
    """

    state: str = Field(examples=["active", "draining", "gone"])
    seen_at: str
    placement: dict[str, Any] | None = Field(description="How it would run the plan now.")
    refused: list[dict[str, Any]]
    fits_when_free: bool = Field(description="It has room once all of its memory is free.")


class DemandBody(BaseModel):
    """Something that was asked for."""

    kind: str = Field(examples=["labels", "kv-cache", "device", "model", "long-rows"])
    words: str = Field(examples=['zone == "home"'])


class WayOutBody(BaseModel):
    """Demands to give up, together, and what that brings: the worker, how it would run, and in how many seconds."""

    give_up: list[DemandBody]
    node: str
    placement: dict[str, Any] | None
    seconds: float | None = Field(description="For the rows that fit no worker now; null where no speed is known.")
    skipped_rows: list[int] = Field(description="Rows that are given up.")
    command: str | None


class ConflictsBody(BaseModel):
    """Demands that cannot all hold. Any one of the ways makes the plan fit; without a way, no demand stands in it."""

    joint: bool = Field(description="No single demand is enough: the one way gives up several together.")
    ways: list[WayOutBody]


class ExplanationBody(BaseModel):
    """Why plans that ask for the same wait. There are `conflicts` where some of their rows fit no connected worker."""

    plan_id: str = Field(description="The first of the plans.")
    plan_ids: list[str] = Field(description=f"At most {PLANS_NAMED} of them.")
    plans_total: int
    rows_left: int
    longest_row_tokens: int
    stuck_rows: int
    condition: str | None
    conflicts: ConflictsBody | None
    workers: list[StandingBody]
    offline: list[StandingBody]


class JobExplanationBody(BaseModel):
    """Where a job's rows are, and why those wait that nobody has begun."""

    object: Literal["job.explanation"] = "job.explanation"
    job_id: str
    state: str
    row_count: int
    answered: int = Field(description="Rows with a result, good or not.")
    running: int
    waiting: int = Field(description="Rows of queued plans, stuck ones among them.")
    stuck: int = Field(description="Rows that fit no connected worker.")
    groups: list[ExplanationBody]


class ExplainedPlanBody(PlanDetailBody):
    """A plan record with its history; while it is not final, what each worker says to it, and what stands in its way."""

    workers: list[StandingBody]
    offline: list[StandingBody] = Field(description="The last process of each node that is not connected.")
    stuck_rows: int = Field(description="Rows that fit no connected worker.")
    longest_row_tokens: int
    conflicts: ConflictsBody | None


def explained_plan_body(detail: PlanDetail, found: Explanation) -> ExplainedPlanBody:
    """One plan, explained."""
    return ExplainedPlanBody(
        **dict(plan_detail_body(detail)),
        workers=[_standing_body(standing) for standing in found.workers],
        offline=[_standing_body(standing) for standing in found.offline],
        stuck_rows=found.stuck_count,
        longest_row_tokens=found.longest_row_tokens,
        conflicts=_conflicts_body(found),
    )


def job_explanation_body(found: JobExplanation) -> JobExplanationBody:
    """One job, explained."""
    job, left = found.job, found.rows_left
    waiting = left.get(ExecutionState.QUEUED, 0)
    return JobExplanationBody(
        job_id=job.job_id,
        state=job.state,
        row_count=job.row_count,
        answered=job.succeeded + job.failed,
        running=sum(left.values()) - waiting,
        waiting=waiting,
        stuck=found.stuck_rows,
        groups=[_explanation_body(group) for group in found.waiting],
    )


def _explanation_body(found: Explanation) -> ExplanationBody:
    return ExplanationBody(
        plan_id=found.plan.plan_id,
        plan_ids=list(found.plan_ids[:PLANS_NAMED]),
        plans_total=len(found.plan_ids),
        rows_left=found.rows_left,
        longest_row_tokens=found.longest_row_tokens,
        stuck_rows=found.stuck_count,
        condition=found.plan.condition,
        conflicts=_conflicts_body(found),
        workers=[_standing_body(standing) for standing in found.workers],
        offline=[_standing_body(standing) for standing in found.offline],
    )


def _conflicts_body(found: Explanation) -> ConflictsBody | None:
    if found.conflicts is None:
        return None
    return ConflictsBody(joint=found.conflicts.is_joint, ways=[_way_body(offer) for offer in found.offers])


def _way_body(offer: Offer) -> WayOutBody:
    placement = offer.way.fit.placement
    return WayOutBody(
        give_up=[DemandBody(kind=demand.kind, words=demand.words) for demand in offer.way.demands],
        node=offer.node,
        placement=None if placement is None else to_json(placement),
        seconds=offer.seconds,
        skipped_rows=list(offer.skipped_rows),
        command=offer.command,
    )


def _standing_body(standing: Standing) -> StandingBody:
    there, placement = standing.worker, standing.placement
    return StandingBody(
        worker_id=there.worker_id,
        node=there.node,
        eligible=standing.is_eligible,
        reasons=list(standing.reasons),
        state=there.state,
        seen_at=iso(standing.seen_ms),
        placement=None if placement is None else to_json(placement),
        refused=[to_json(tier) for tier in standing.refused],
        fits_when_free=standing.fits_when_free,
    )
