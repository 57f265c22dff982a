"""What happens when a user changes how a job runs while it waits? Its queued plans are planned anew; the rest stays."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ollm_service.coordinator.drafting import draft
from ollm_service.coordinator.service import Service
from ollm_service.coordinator.waiting import idle_slots
from ollm_service.core.errors import Conflict, InvalidJob
from ollm_service.core.labels import ANY
from ollm_service.core.options import RuntimeConfig
from ollm_service.store.amending import Amended, Amendment, Options
from ollm_service.store.views import JobView


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a user wants otherwise, well-formed as JSON and not yet judged.

    `runtime` holds the options to change alone, null for those that go back to their default; `where` is a label expression, or
    `any` for none; null leaves it as it is. `skip_rows` are the numbers of rows to give up.
    """

    runtime: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None
    skip_rows: Collection[int] = ()


def amend(service: Service, job_id: str, tenant_id: str, change: Change) -> tuple[JobView, Amended]:
    """Change a job's queued plans, then hint.

    Raises NotFound, InvalidJob where nothing is to be changed or a row is not there, Conflict for a job that has ended or that
    somebody else amends at this moment, and what a submission raises for these options; then nothing is changed.
    """
    if not (change.runtime or change.where or change.skip_rows):
        raise InvalidJob(
            "Nothing is to be changed.", remedy="Say what: a label expression as `where`, runtime options, or rows to skip."
        )
    job = service.store.jobs.get(job_id, tenant_id)
    if job.state.is_final:
        raise Conflict(f"Job {job_id} has ended: {job.state}.", remedy="Submit it anew, or retry its failed rows.")
    unknown = sorted(row for row in change.skip_rows if not 0 <= row < job.row_count)
    if unknown:
        raise InvalidJob(
            f"Job {job_id} has no row {unknown[0]:,}.",
            param="skip_rows",
            remedy=f"Its rows are 0 to {job.row_count - 1:,}.",
        )
    if not (change.runtime or change.where):
        return service.store.jobs.amend(job_id, tenant_id, None, skip=change.skip_rows)
    if job.config is None:
        raise Conflict(
            f"The options of job {job_id} cannot be read.", remedy="A newer release may have written them: upgrade this one."
        )
    before = Options(config=job.config, where=job.where)
    after = _changed(before, change)
    drafted = draft(service.fleet.fresh(), job.model, after.config, after.where)
    amendment = Amendment(
        before=before,
        after=after,
        runtime_plan=drafted.planned.plan,
        profile=drafted.planned.profile,
        requirements=drafted.demand_executable(),
        condition=drafted.condition,
        inventory_seq=drafted.fleet.inventory_seq,
        reason=_in_words(change),
    )
    view, amended = service.store.jobs.amend(job_id, tenant_id, amendment, skip=change.skip_rows)
    if drafted.class_id is not None and amended.plans:
        service.hints.send(drafted.class_id, min(idle_slots(drafted.capable_workers), amended.plans))
    return view, amended


def _changed(before: Options, change: Change) -> Options:
    # An option that is null goes back to its default, and no longer stands in the way of the others.
    config = RuntimeConfig.from_dict({**before.config.as_dict(), **change.runtime})
    where = before.where if change.where is None else None if change.where.strip() == ANY else change.where
    return Options(config=config, where=where)


def _in_words(change: Change) -> str:
    words = [f"{name} {'any' if value is None else value}" for name, value in sorted(change.runtime.items())]
    return ", ".join([*words, *([f"where {change.where}"] if change.where is not None else [])])
