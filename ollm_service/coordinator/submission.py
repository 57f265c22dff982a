"""What happens when a user submits, previews or retries a job? Judged, planned, split and stored; then hinted."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ollm_service.coordinator.drafting import Draft, draft, draft_rows
from ollm_service.coordinator.promises import check_unchanged
from ollm_service.coordinator.rows import check_rows
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.core.content import MOST_IMAGE_TOKENS
from ollm_service.core.errors import Conflict, InvalidJob, RequestError
from ollm_service.core.options import GenerationConfig
from ollm_service.core.row_size import most_tokens
from ollm_service.core.splitting import split
from ollm_service.store.jobs import NewJob, NewPlan, NewRow
from ollm_service.store.quotes import StoredPreview
from ollm_service.store.views import JobView

ROWS_PER_PLAN = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a user asks for, well-formed as JSON and not yet judged. `body_digest` identifies it for its idempotency key.

    `plan` names a preview, which then says what model and options are; those must be left out.
    """

    rows: Sequence[Any]
    model: str | None = None
    plan: str | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    where: str | None = None
    deadline_seconds: float | None = None
    idempotency_key: str | None = None
    body_digest: str = ""
    tenant_id: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """The stored job; `is_new` is false where the same idempotency key had stored it before."""

    job: JobView
    is_new: bool


def submit(service: Service, submission: Submission) -> Submitted:
    """Store a job and its plans in one transaction, then hint.

    Raises the RequestErrors of `draft` and `check_rows`, InvalidOption, PlanNotExecutable, IdempotencyConflict and
    DatabaseUnavailable; then nothing is stored. Never waits for the broker.
    """
    known = _known(service, submission.tenant_id, submission.idempotency_key, submission.body_digest)
    if known is not None:
        return known
    promised = None if submission.plan is None else service.store.quotes.preview(submission.plan, submission.tenant_id)
    wanted = _wanted(submission) if promised is None else _as_previewed(submission, promised)
    config = service.options.runtime_config(wanted.runtime)
    generation = service.options.generation_config(wanted.generation)
    checked = check_rows(submission.rows, generation)
    drafted, rows = draft_rows(service.fleet.snapshot(), wanted.model, config, wanted.where, checked)
    if promised is not None:
        check_unchanged(promised, drafted, submission.rows)
    deadline = submission.deadline_seconds
    job = NewJob(
        job_id=service.make_id("job"),
        tenant_id=submission.tenant_id,
        model=wanted.model.strip(),
        rows=rows,
        plans=_split(service, rows, generation, drafted),
        config=drafted.config,
        generation=generation,
        priority=submission.priority,
        where=wanted.where,
        deadline_ms=None if deadline is None else math.ceil(deadline * 1000),
        quoted=None if promised is None else promised.request.get("quoted"),
        idempotency_key=submission.idempotency_key,
        body_digest=submission.body_digest,
        inventory_seq=drafted.fleet.inventory_seq,
    )
    return _store(service, job, drafted)


def retry(service: Service, job_id: str, tenant_id: str, idempotency_key: str | None) -> Submitted:
    """Make a new job of a job's failed rows, with its model and options and without its deadline.

    Raises NotFound, and Conflict while the job still runs or where nothing can be retried: a row that was invalid as it was
    submitted stays invalid.
    """
    digest = hashlib.sha256(f"retry of {job_id}".encode()).hexdigest()
    known = _known(service, tenant_id, idempotency_key, digest)
    if known is not None:
        return known
    old = service.store.jobs.get(job_id, tenant_id)
    if not old.state.is_final:
        raise Conflict(f"Job {job_id} is still {old.state}.", remedy="Wait until it has ended, or cancel it first.")
    if old.config is None or old.generation is None:
        raise Conflict(
            f"The options of job {job_id} cannot be read.", remedy="A newer release may have written them: upgrade this one."
        )
    failed = [row for row in service.store.jobs.failed_rows(job_id, tenant_id) if row.request]
    if not failed:
        raise Conflict(
            f"Job {job_id} has no failed rows that could succeed when tried again.",
            remedy="Rows that were invalid as submitted must be mended and submitted anew.",
        )
    rows = [NewRow(row=number, custom_id=row.custom_id, request=row.request) for number, row in enumerate(failed)]
    drafted = draft(service.fleet.snapshot(), old.model, old.config, old.where)
    job = NewJob(
        job_id=service.make_id("job"),
        tenant_id=tenant_id,
        model=old.model,
        rows=rows,
        plans=_split(service, rows, old.generation, drafted),
        config=old.config,
        generation=old.generation,
        priority=old.priority,
        where=old.where,
        idempotency_key=idempotency_key,
        body_digest=digest,
        inventory_seq=drafted.fleet.inventory_seq,
        retry_of=job_id,
    )
    return _store(service, job, drafted)


def chunks(rows: Sequence[NewRow], generation: GenerationConfig, drafted: Draft) -> Iterator[tuple[int, ...]]:
    """The numbers of the rows of each plan record, as `core.splitting` says; a row that is wrong by itself needs nothing."""
    profile = drafted.planned.profile
    context = profile.most_row_tokens if profile else None
    of_image = profile.most_image_tokens if profile else MOST_IMAGE_TOKENS
    bounds = [0 if row.error else most_tokens(row.request, generation.max_new_tokens, of_image) for row in rows]
    needs = bounds if context is None else [min(bound, context) for bound in bounds]
    for positions in split(needs, rows_per_plan=ROWS_PER_PLAN):
        yield tuple(rows[position].row for position in positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What decides how a job runs."""

    model: str
    runtime: Mapping[str, Any]
    generation: Mapping[str, Any]
    where: str | None


def _wanted(submission: Submission) -> _Wanted:
    if submission.model is None:
        raise RequestError("`model` is missing.", param="model", remedy="Name a model, or a preview as `plan`.")
    return _Wanted(model=submission.model, runtime=submission.runtime, generation=submission.generation, where=submission.where)


def _as_previewed(submission: Submission, promised: StoredPreview) -> _Wanted:
    given = {"model": submission.model, "runtime": submission.runtime, "generation": submission.generation}
    for name, value in {**given, "where": submission.where}.items():
        if value and value != promised.request.get(name):
            raise InvalidJob(
                f"`{name}` differs from what {promised.preview_id} was made for.",
                param=name,
                remedy=f"Leave `{name}` out, or make a new preview with it.",
            )
    request = promised.request
    return _Wanted(
        model=request["model"], runtime=request["runtime"], generation=request["generation"], where=request.get("where")
    )


def _known(service: Service, tenant_id: str, key: str | None, digest: str) -> Submitted | None:
    """The job that this key has stored before, found without judging the body again: the fleet may have changed since."""
    if key is None:
        return None
    job = service.store.jobs.find_idempotent(tenant_id, key, digest)
    return None if job is None else Submitted(job=job, is_new=False)


def _split(service: Service, rows: Sequence[NewRow], generation: GenerationConfig, drafted: Draft) -> list[NewPlan]:
    requirements, condition = drafted.demand_executable(), drafted.condition
    return [
        NewPlan(
            plan_id=service.make_id("plan"),
            rows=numbers,
            runtime_plan=drafted.planned.plan,
            profile=drafted.planned.profile,
            config=drafted.config,
            requirements=requirements,
            condition=condition,
        )
        for numbers in chunks(rows, generation, drafted)
    ]


def _store(service: Service, job: NewJob, drafted: Draft) -> Submitted:
    stored, is_new = service.store.jobs.submit(job)
    if is_new and not stored.state.is_final:
        _hint(service, len(job.plans), drafted)
    return Submitted(job=stored, is_new=is_new)


def _hint(service: Service, plans: int, drafted: Draft) -> None:
    """Wake as many capable workers as there are plans. Who of them is busy is not asked: their hints expire."""
    if drafted.class_id is not None and drafted.condition is None:
        slots = sum(worker.capabilities.slots for worker in drafted.capable_workers)
        service.hints.send(drafted.class_id, min(slots, plans))
