"""How do jobs and plans look on the wire? Pinned shapes: fields may be added, none is renamed."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, Field

from ollm_service.coordinator.fleet import Verdict
from ollm_service.core.quote import Quote
from ollm_service.core.wire import to_json
from ollm_service.store.downloads import DownloadView
from ollm_service.store.views import AttemptView, EventView, JobView, PlanDetail, PlanView

Item = TypeVar("Item", "PlanBody", "JobBody")
PLANS_SHOWN = 100


class Counts(BaseModel):
    """How many rows are where; they sum to `row_count`."""

    succeeded: int
    failed: int
    pending: int


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int


class PlanBody(BaseModel):
    """One plan record. `worker` is the id of the worker that holds it, or held it last, `node` that worker's machine."""

    id: str = Field(examples=["plan_019ab0c1d2e37f4a8b5c6d7e8f901234"])
    object: Literal["plan"] = "plan"
    job_id: str
    number: int = Field(description="Its place among its job's plans, from 0.")
    model: str
    state: str = Field(examples=["queued", "leased", "running", "succeeded", "failed", "cancelled", "expired", "dead"])
    condition: str | None = Field(
        description="Why a queued plan waits: no-capable-worker, model-not-present or declined-everywhere."
    )
    class_id: str
    row_count: int
    rows_done: int
    rows_failed: int
    runtime_plan: dict[str, Any] = Field(description="The RuntimePlan: as it ran, once a row is recorded, else as planned.")
    resolved_model: dict[str, Any] = Field(description="What the model reference turned out to mean.")
    requirements: dict[str, Any] = Field(description="What a worker must offer.")
    attempt: int = Field(description="How often it was claimed.")
    failures: int
    losses: int
    declines: int
    worker: str | None
    node: str | None
    cancel_requested: bool
    reason: str | None = Field(description="Why it is in its state.")
    available_at: str
    created_at: str
    started_at: str | None
    finished_at: str | None


class EventBody(BaseModel):
    """One step of a plan's history."""

    at: str
    kind: str
    from_state: str | None = Field(serialization_alias="from")
    to_state: str | None = Field(serialization_alias="to")
    worker: str | None
    node: str | None
    reason: str | None


class AttemptBody(BaseModel):
    """One worker's try. `estimate` is what placement reckoned with, `measured` what was seen; bytes and seconds."""

    number: int
    worker: str
    node: str
    outcome: str
    runtime_plan: dict[str, Any] | None
    placement: dict[str, Any]
    estimate: dict[str, Any] | None
    measured: dict[str, Any]
    started_at: str
    ended_at: str | None


class VerdictBody(BaseModel):
    """Whether a worker can take the plan, and if not, every reason."""

    worker_id: str
    node: str
    eligible: bool
    reasons: list[str]


class PlanDetailBody(PlanBody):
    """A plan record with its history."""

    planned: dict[str, Any] = Field(description="The RuntimePlan as it was planned, before any attempt.")
    events: list[EventBody]
    attempts: list[AttemptBody]


class DownloadBody(BaseModel):
    """A model on its way from the hub to a worker. Sizes in bytes; `bytes_total` is null until the hub has told it."""

    id: str = Field(examples=["dl_019ab0c1d2e37f4a8b5c6d7e8f901234"])
    object: Literal["download"] = "download"
    model: str = Field(description="The repository, and its revision where one was asked for.")
    folder: str = Field(description="The folder of the models root that holds it then.")
    state: str = Field(examples=["queued", "running", "done", "failed"])
    target: str | None = Field(description="The node that was asked for; null: any.")
    node: str | None = Field(description="Who fetches it, or tried last.")
    worker: str | None
    attempt: int = Field(description="How often a worker took it.")
    bytes_done: int
    bytes_total: int | None
    commit: str | None = Field(description="What the revision meant when the download began.")
    reason: str | None = Field(description="Why it failed, or has to be tried again.")
    created_at: str
    started_at: str | None
    finished_at: str | None


class JobBody(BaseModel):
    """A job, with at most 100 of its plans."""

    id: str = Field(examples=["job_019ab0c1d2e37f4a8b5c6d7e8f901234"])
    object: Literal["job"] = "job"
    state: str = Field(examples=["queued", "running", "succeeded", "failed", "cancelled", "expired"])
    model: str
    row_count: int
    counts: Counts
    usage: Usage
    plans_total: int
    plans: list[PlanBody]
    runtime: dict[str, Any] | None = Field(description="Null where a newer release's options cannot be read.")
    generation: dict[str, Any] | None
    priority: int
    where: str | None
    retry_of: str | None = Field(description="The job whose failed rows these are.")
    quoted: dict[str, Any] | None = Field(description="What its preview said of its time; null without one.")
    downloads: list[DownloadBody] = Field(
        [], description="How far the models are that the shown plans wait for, or why they could not be fetched."
    )
    created_at: str
    finished_at: str | None
    deadline_at: str | None


class AmendedJobBody(JobBody):
    """A job after its plans were amended. Plans that run keep their options, and are among `plans_kept`."""

    plans_amended: int = Field(description="Plans that wait with the new options now.")
    plans_kept: int = Field(description="Unfinished plans that keep what they had.")
    rows_skipped: int


class Page(BaseModel, Generic[Item]):
    """One page of a list; `next` is the `after` of the next page."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    next: str | None = None

    @classmethod
    def of(cls, items: Sequence[Item], *, limit: int) -> Self:
        """A page of at most `limit` items out of one more than that, where there are more."""
        shown, has_more = list(items[:limit]), len(items) > limit
        return cls(data=shown, has_more=has_more, next=shown[-1].id if has_more else None)


class JobPage(Page[JobBody]):
    """Jobs, newest first, without their plans."""


class PlanPage(Page[PlanBody]):
    """Plans, those of the newest jobs first, each job's in order."""


class RowProblem(BaseModel):
    """A row that would fail by itself."""

    row: int
    custom_id: str
    code: str
    message: str


class RowsPreview(BaseModel):
    """What the given rows would become."""

    row_count: int
    plans_total: int
    invalid: list[RowProblem]


class WorkerQuoteBody(BaseModel):
    """One worker's part: how it would run and how fast, or why it cannot take part. Sizes in bytes, rates per second."""

    name: str
    is_hypothetical: bool
    refused: list[str]
    placement: dict[str, Any] | None
    device: dict[str, Any] | None
    free_bytes: int
    rate: dict[str, Any] | None
    rows_an_hour: float
    share: float
    left_out_rows: int
    longest_row_tokens: int | None = Field(description="Rows of more tokens have no room here; null where all have.")
    begins_seconds: float | None = Field(description="When it takes its first plan of this job; null where it takes none.")
    saves_seconds: float | None = Field(description="So much later the job would end without it; negative: sooner.")


class LeaveOutBody(BaseModel):
    """Without these nodes the job would end sooner, in so many seconds; `where` is the label expression that leaves them out."""

    nodes: list[str]
    where: str
    seconds: float


class QuoteBody(BaseModel):
    """When the rows would be answered, and by whom. Seconds from now: expected and a range; null where no speed is known."""

    row_count: int
    prompt_tokens: int
    most_output_tokens: int
    longest_row_tokens: int
    seconds: float | None
    fastest_seconds: float | None
    slowest_seconds: float | None
    is_measured: bool
    unplaceable_rows: int
    plans_ahead: int = Field(description="Plans of other jobs that come first, and are counted in.")
    plans_not_counted: int = Field(description="Plans of other jobs that may come first, for how long nobody knows.")
    leave_out: LeaveOutBody | None
    seconds_anywhere: float | None = Field(description="Without the label expression, where that is noticeably less.")
    workers: list[WorkerQuoteBody]


class PreviewBody(BaseModel):
    """What would run where, how and why. No job was stored; `id` names the preview to a submission, for a week.

    `plan` and `runtime_plan` are the same. `placement` is that of the worker with the largest share; it and `quote` need rows.
    """

    object: Literal["plan.preview"] = "plan.preview"
    id: str | None
    model: str
    plan: dict[str, Any]
    placement: dict[str, Any] | None
    quote: QuoteBody | None
    executable: bool
    runtime_plan: dict[str, Any]
    resolved_model: dict[str, Any]
    requirements: dict[str, Any] | None
    class_id: str | None
    condition: str | None
    workers: list[VerdictBody]
    rows: RowsPreview | None


def quote_body(quote: Quote) -> QuoteBody:
    """A quote."""
    return QuoteBody(**to_json(quote))


def main_placement(quote: Quote) -> dict[str, Any] | None:
    """How the worker with the largest share would run it."""
    placed = [found for found in quote.workers if found.placement is not None]
    main = max(placed, key=lambda found: found.share, default=None)
    return None if main is None else dict(to_json(main.placement))


def iso(milliseconds: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def iso_or_none(milliseconds: int | None) -> str | None:
    """The same, of a time that may not have come."""
    return None if milliseconds is None else iso(milliseconds)


def download_body(download: DownloadView) -> DownloadBody:
    """A download."""
    return DownloadBody(
        id=download.download_id,
        model=download.reference,
        folder=download.folder,
        state=download.state,
        target=download.target,
        node=download.node,
        worker=download.worker_id,
        attempt=download.attempt,
        bytes_done=download.bytes_done,
        bytes_total=download.bytes_total,
        commit=download.commit_id,
        reason=download.reason,
        created_at=iso(download.created_ms),
        started_at=iso_or_none(download.started_ms),
        finished_at=iso_or_none(download.finished_ms),
    )


def job_body(job: JobView, plans: Sequence[PlanView], downloads: Sequence[DownloadView] = ()) -> JobBody:
    """A job with these of its plans, and the downloads that they wait for."""
    return JobBody(
        id=job.job_id,
        state=job.state,
        model=job.model,
        row_count=job.row_count,
        counts=Counts(succeeded=job.succeeded, failed=job.failed, pending=job.pending),
        usage=Usage(prompt_tokens=job.prompt_tokens, completion_tokens=job.completion_tokens),
        plans_total=job.plans_total,
        plans=[plan_body(plan) for plan in plans],
        runtime=job.config.as_dict() if job.config else None,
        generation=job.generation.as_dict() if job.generation else None,
        priority=job.priority,
        where=job.where,
        retry_of=job.retry_of,
        quoted=dict(job.quoted) if job.quoted else None,
        downloads=[download_body(download) for download in downloads],
        created_at=iso(job.created_ms),
        finished_at=iso_or_none(job.finished_ms),
        deadline_at=iso_or_none(job.deadline_ms),
    )


def plan_body(plan: PlanView) -> PlanBody:
    """A plan record."""
    return PlanBody(**_plan_fields(plan))


def plan_detail_body(detail: PlanDetail) -> PlanDetailBody:
    """A plan record with its history."""
    return PlanDetailBody(
        **_plan_fields(detail.plan),
        planned=detail.plan.planned.as_dict(),
        events=[_event_body(event) for event in detail.events],
        attempts=[_attempt_body(attempt) for attempt in detail.attempts],
    )


def verdict_body(verdict: Verdict) -> VerdictBody:
    """What one worker says to a plan."""
    return VerdictBody(
        worker_id=verdict.worker_id, node=verdict.node, eligible=verdict.is_eligible, reasons=list(verdict.reasons)
    )


def _plan_fields(plan: PlanView) -> dict[str, Any]:
    return {
        "id": plan.plan_id,
        "job_id": plan.job_id,
        "number": plan.number,
        "model": plan.model,
        "state": plan.state,
        "condition": plan.condition,
        "class_id": plan.class_id,
        "row_count": plan.row_count,
        "rows_done": plan.rows_done,
        "rows_failed": plan.rows_failed,
        "runtime_plan": plan.runtime_plan.as_dict(),
        "resolved_model": to_json(plan.runtime_plan.resolved_model),
        "requirements": plan.requirements.as_dict(),
        "attempt": plan.attempt,
        "failures": plan.failures,
        "losses": plan.losses,
        "declines": plan.declines,
        "worker": plan.worker_id,
        "node": plan.node,
        "cancel_requested": plan.cancel_requested,
        "reason": plan.reason,
        "available_at": iso(plan.available_ms),
        "created_at": iso(plan.created_ms),
        "started_at": iso_or_none(plan.started_ms),
        "finished_at": iso_or_none(plan.finished_ms),
    }


def _event_body(event: EventView) -> EventBody:
    return EventBody(
        at=iso(event.at_ms),
        kind=event.kind,
        from_state=event.from_state,
        to_state=event.to_state,
        worker=event.worker_id,
        node=event.node,
        reason=event.reason,
    )


def _attempt_body(attempt: AttemptView) -> AttemptBody:
    placement = dict(attempt.placement)
    return AttemptBody(
        number=attempt.number,
        worker=attempt.worker_id,
        node=attempt.node,
        outcome=attempt.outcome,
        runtime_plan=attempt.runtime_plan.as_dict() if attempt.runtime_plan else None,
        placement=placement,
        estimate=placement.get("estimate"),
        measured=dict(attempt.measured),
        started_at=iso(attempt.started_ms),
        ended_at=iso_or_none(attempt.ended_ms),
    )
