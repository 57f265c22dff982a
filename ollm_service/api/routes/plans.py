"""How are plans previewed, listed and explained over HTTP?"""

from typing import Annotated

from fastapi import APIRouter, Query

from ollm_service.api import requests
from ollm_service.api.explanations import ExplainedPlanBody, explained_plan_body
from ollm_service.api.openapi import body_of, failures
from ollm_service.api.requests import parse_body
from ollm_service.api.routes.access import After, InJob, Limit, PlanId, RawBody, ServiceHere
from ollm_service.api.shapes import (
    PlanPage,
    PreviewBody,
    RowProblem,
    RowsPreview,
    main_placement,
    plan_body,
    quote_body,
    verdict_body,
)
from ollm_service.coordinator.explaining import explain_plan
from ollm_service.coordinator.preview import Preview, PreviewRequest, preview
from ollm_service.coordinator.service import DEFAULT_TENANT
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.wire import to_json

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post(
    "/preview",
    operation_id="previewPlan",
    summary="See what would run where, and why",
    openapi_extra=body_of(requests.PreviewRequest),
    responses=failures(400, 401, 404, 413, 422, 503),
)
def preview_plan(service: ServiceHere, raw: RawBody) -> PreviewBody:
    """The plan of a model reference and options, what each worker says to it, and with rows a quote. No job is stored."""
    body, _ = parse_body(requests.PreviewRequest, raw)
    asked = PreviewRequest(
        model=body.model,
        rows=body.rows,
        runtime=body.runtime or {},
        generation=body.generation or {},
        where=body.where,
        if_workers=body.if_workers or (),
    )
    return _body(preview(service, asked), body.model)


@router.get("", operation_id="listAllPlans", summary="List plans of all jobs", responses=failures(400, 401, 404, 503))
def list_plans(
    service: ServiceHere,
    job_id: InJob = None,
    state: Annotated[ExecutionState | None, Query(description="Only those in this state.")] = None,
    after: After = None,
    limit: Limit = 100,
) -> PlanPage:
    """Plans of the newest jobs first, each job's in order."""
    plans = service.store.jobs.list_plans(DEFAULT_TENANT, job_id=job_id, state=state, after=after, limit=limit + 1)
    return PlanPage.of([plan_body(plan) for plan in plans], limit=limit)


@router.get("/{plan_id}", operation_id="getPlan", summary="Show and explain a plan", responses=failures(401, 404, 503))
def get_plan(service: ServiceHere, plan_id: PlanId) -> ExplainedPlanBody:
    """A plan with its history and attempts; while it is not final, also whether each worker could take it.

    Where one that waits has rows that fit no worker: which demands cannot all hold, and what giving one up would bring.
    """
    detail = service.store.jobs.plan(plan_id, DEFAULT_TENANT)
    return explained_plan_body(detail, explain_plan(service, detail.plan, DEFAULT_TENANT))


def _body(found: Preview, model: str) -> PreviewBody:
    drafted, rows = found.draft, found.rows
    plan = drafted.planned.plan
    return PreviewBody(
        id=found.preview_id,
        model=model,
        plan=plan.as_dict(),
        placement=main_placement(found.quote) if found.quote else None,
        quote=quote_body(found.quote) if found.quote else None,
        executable=plan.is_executable(),
        runtime_plan=plan.as_dict(),
        resolved_model=to_json(plan.resolved_model),
        requirements=drafted.requirements.as_dict() if drafted.requirements else None,
        class_id=drafted.class_id,
        condition=drafted.condition,
        workers=[verdict_body(verdict) for verdict in found.verdicts],
        rows=None
        if rows is None
        else RowsPreview(
            row_count=len(rows),
            plans_total=found.plans_total,
            invalid=[
                RowProblem(row=row.row, custom_id=row.custom_id, code=row.error.code, message=row.error.message)
                for row in rows
                if row.error is not None
            ],
        ),
    )
