"""How are jobs submitted, watched, cancelled and retried over HTTP?"""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response, status

from ollm_service.api.explanations import JobExplanationBody, job_explanation_body
from ollm_service.api.openapi import body_of, failures
from ollm_service.api.requests import AmendRequest, JobRequest, RetryRequest, body_digest, parse_body
from ollm_service.api.results import stream_results
from ollm_service.api.routes.access import After, JobId, Limit, RawBody, ServiceHere
from ollm_service.api.shapes import PLANS_SHOWN, AmendedJobBody, JobBody, JobPage, PlanPage, job_body, plan_body
from ollm_service.coordinator.amending import Change, amend
from ollm_service.coordinator.explaining import explain_job
from ollm_service.coordinator.models import waiting_downloads
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.coordinator.submission import Submission, Submitted, retry, submit
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.store.views import JobView

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
PlansShown = Annotated[int, Query(ge=0, le=PLANS_SHOWN, description="How many of its plans to show.")]


@router.post(
    "",
    operation_id="submitJob",
    summary="Submit a job",
    status_code=status.HTTP_201_CREATED,
    openapi_extra=body_of(JobRequest),
    responses=failures(400, 401, 404, 409, 413, 422, 503),
)
def submit_job(service: ServiceHere, raw: RawBody, response: Response) -> JobBody:
    """Plan the job, store it and answer with its plans; nothing has run yet.

    The same `idempotency_key` with the same body answers with the job that was stored before.
    """
    body, data = parse_body(JobRequest, raw)
    submission = Submission(
        model=body.model,
        plan=body.plan,
        rows=body.rows,
        runtime=body.runtime or {},
        generation=body.generation or {},
        priority=body.priority,
        where=body.where,
        deadline_seconds=body.deadline_seconds,
        idempotency_key=body.idempotency_key,
        body_digest=body_digest(data),
    )
    return _answer(service, submit(service, submission), response)


@router.get("", operation_id="listJobs", summary="List jobs, newest first", responses=failures(400, 401, 503))
def list_jobs(service: ServiceHere, after: After = None, limit: Limit = 100) -> JobPage:
    """Jobs without their plans."""
    jobs = service.store.jobs.list(DEFAULT_TENANT, after=after, limit=limit + 1)
    return JobPage.of([job_body(job, ()) for job in jobs], limit=limit)


@router.get("/{job_id}", operation_id="getJob", summary="Show a job", responses=failures(401, 404, 503))
def get_job(service: ServiceHere, job_id: JobId, plans: PlansShown = PLANS_SHOWN) -> JobBody:
    """A job with its counts and its first plans."""
    return _with_plans(service, service.store.jobs.get(job_id, DEFAULT_TENANT), plans)


@router.get("/{job_id}/plans", operation_id="listPlans", summary="List a job's plans", responses=failures(400, 401, 404, 503))
def list_plans(service: ServiceHere, job_id: JobId, after: After = None, limit: Limit = 100) -> PlanPage:
    """All plans of a job, in order."""
    plans = service.store.jobs.plans(job_id, DEFAULT_TENANT, after=after, limit=limit + 1)
    return PlanPage.of([plan_body(plan) for plan in plans], limit=limit)


@router.get("/{job_id}/explain", operation_id="explainJob", summary="Explain why a job waits", responses=failures(401, 404, 503))
def explain(service: ServiceHere, job_id: JobId) -> JobExplanationBody:
    """Where its rows are, which of them fit no worker, which demands cannot all hold, and what giving one up would bring."""
    return job_explanation_body(explain_job(service, job_id, DEFAULT_TENANT))


@router.post("/{job_id}/cancel", operation_id="cancelJob", summary="Cancel a job", responses=failures(401, 404, 503))
def cancel_job(service: ServiceHere, job_id: JobId) -> JobBody:
    """End what waits, and ask workers to stop what runs. What is finished stays; cancelling twice is harmless."""
    return _with_plans(service, service.store.jobs.cancel(job_id, DEFAULT_TENANT), PLANS_SHOWN)


@router.post(
    "/{job_id}/amend",
    operation_id="amendJob",
    summary="Change how a job's waiting plans run",
    openapi_extra=body_of(AmendRequest),
    responses=failures(400, 401, 404, 409, 413, 422, 503),
)
def amend_job(service: ServiceHere, job_id: JobId, raw: RawBody) -> AmendedJobBody:
    """Give the plans that nobody has begun other options, or skip rows of theirs. Those that run or have ended stay so."""
    body, _ = parse_body(AmendRequest, raw)
    change = Change(runtime=body.runtime or {}, where=body.where, skip_rows=body.skip_rows or ())
    job, amended = amend(service, job_id, DEFAULT_TENANT, change)
    shown = _with_plans(service, job, PLANS_SHOWN)
    return AmendedJobBody(
        **shown.model_dump(), plans_amended=amended.plans, plans_kept=amended.plans_kept, rows_skipped=amended.rows_skipped
    )


@router.post(
    "/{job_id}/retry",
    operation_id="retryJob",
    summary="Retry a job's failed rows",
    status_code=status.HTTP_201_CREATED,
    openapi_extra=body_of(RetryRequest, required=False),
    responses=failures(400, 401, 404, 409, 422, 503),
)
def retry_job(service: ServiceHere, job_id: JobId, raw: RawBody, response: Response) -> JobBody:
    """Make a new job of the rows that failed while they ran. The old job stays as it is."""
    body = parse_body(RetryRequest, raw)[0] if raw.strip() else RetryRequest()
    return _answer(service, retry(service, job_id, DEFAULT_TENANT, body.idempotency_key), response)


NDJSON: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One JSON object a line: row, custom_id, text, finish_reason, usage, error, plan_id, attempt, cursor.",
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
    }
}


@router.get(
    "/{job_id}/results",
    operation_id="streamResults",
    summary="Stream a job's results",
    response_class=Response,
    responses=NDJSON | failures(400, 401, 404, 503),
)
def job_results(
    service: ServiceHere,
    job_id: JobId,
    cursor: Annotated[int, Query(ge=0, description="Only results after this one; 0 is the beginning.")] = 0,
    limit: Annotated[int | None, Query(ge=1, description="At most so many lines; unset: all that are there.")] = None,
    wait_seconds: Annotated[float, Query(ge=0, le=60, description="Wait so long for a first line while the job runs.")] = 0,
) -> Response:
    """Results in the order in which they were recorded, while the job runs and after it; each line carries its cursor.

    The header `x-job-state` is the job's state as of before the first line was read: where it is final, the stream is complete.
    """
    return stream_results(service, job_id, DEFAULT_TENANT, cursor=cursor, limit=limit, wait_seconds=wait_seconds)


def _answer(service: Service, submitted: Submitted, response: Response) -> JobBody:
    response.headers["location"] = f"/v1/jobs/{submitted.job.job_id}"
    if not submitted.is_new:
        response.headers["idempotent-replayed"] = "true"
    return _with_plans(service, submitted.job, PLANS_SHOWN)


def _with_plans(service: Service, job: JobView, most: int) -> JobBody:
    plans = service.store.jobs.plans(job.job_id, job.tenant_id, limit=most) if most else ()
    absent = {plan.requirements.download for plan in plans if plan.state is ExecutionState.QUEUED}
    return job_body(job, plans, waiting_downloads(service, [name for name in absent if name is not None]))
