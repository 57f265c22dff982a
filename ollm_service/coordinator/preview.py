"""What would run where, how, and when would it be done? The answer to a submission that nobody has made yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ollm_service.coordinator.drafting import Draft, draft, draft_rows
from ollm_service.coordinator.fleet import Verdict, live_when_its_turn_comes, verdicts
from ollm_service.coordinator.promises import rows_digest
from ollm_service.coordinator.rows import check_rows
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.coordinator.submission import ROWS_PER_PLAN, chunks
from ollm_service.core.known_devices import as_offered_by, hypothetical
from ollm_service.core.options import GenerationConfig
from ollm_service.core.quote import Ahead, Candidate, Job, Quote, RowSize, quote
from ollm_service.core.row_size import is_sampled, own_limit, prompt_bytes
from ollm_service.store.jobs import NewRow
from ollm_service.store.quotes import StoredPreview
from ollm_service.store.views import PlansAhead, WorkerView


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewRequest:
    """What a user wants to know, well-formed as JSON and not yet judged. `if_workers` are machines that are only imagined."""

    model: str
    rows: Sequence[Any] | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None
    if_workers: Sequence[str | Mapping[str, Any]] = ()
    tenant_id: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A draft, what each worker says to it, the checked rows where some were given, and then a quote.

    `preview_id` names it to a submission; None for a plan that is not executable. `plans_total` is how many plan records the rows
    would become.
    """

    draft: Draft
    verdicts: tuple[Verdict, ...]
    rows: Sequence[NewRow] | None
    quote: Quote | None
    preview_id: str | None
    plans_total: int


def preview(service: Service, request: PreviewRequest) -> Preview:
    """Judge and plan as a submission would, quote it, and remember what was shown.

    Raises what a submission raises, and InvalidOption for an imagined worker; shows a plan that is not executable all the same.
    """
    config = service.options.runtime_config(request.runtime)
    settings = service.options.generation_config(request.generation)
    checked = None if request.rows is None else check_rows(request.rows, settings)
    fleet = service.fleet.snapshot()
    if checked is None:
        drafted = draft(fleet, request.model, config, request.where)
    else:
        drafted, checked = draft_rows(fleet, request.model, config, request.where, checked)
    found = () if drafted.requirements is None else verdicts(drafted.requirements, drafted.fleet.workers)
    quoted = None if checked is None else _quote(service, drafted, checked, settings, request.if_workers)
    preview_id = _keep(service, drafted, request, quoted)
    plans_total = sum(1 for _ in chunks(checked or (), settings, drafted))
    return Preview(draft=drafted, verdicts=found, rows=checked, quote=quoted, preview_id=preview_id, plans_total=plans_total)


def _keep(service: Service, drafted: Draft, request: PreviewRequest, quoted: Quote | None) -> str | None:
    if drafted.requirements is None:
        return None
    stored = StoredPreview(
        preview_id=service.make_id("pl"),
        request={
            "model": request.model,
            "runtime": dict(request.runtime),
            "generation": dict(request.generation),
            "where": request.where,
            "rows_digest": None if request.rows is None else rows_digest(request.rows),
            # With imagined machines it is not the quote of what a submission would run.
            "quoted": None if quoted is None or request.if_workers else _time_of(quoted),
        },
        planned=drafted.planned.plan,
        requirements=drafted.requirements,
    )
    service.store.quotes.keep_preview(stored, request.tenant_id)
    return stored.preview_id


def _time_of(quoted: Quote) -> dict[str, Any]:
    return {name: getattr(quoted, name) for name in ("seconds", "fastest_seconds", "slowest_seconds", "is_measured")}


def _quote(
    service: Service, drafted: Draft, rows: Sequence[NewRow], settings: GenerationConfig, imagined: Sequence[Any]
) -> Quote | None:
    profile, requirements = drafted.planned.profile, drafted.requirements
    if profile is None or requirements is None:
        return None
    workers = drafted.fleet.workers
    candidates = [
        Candidate(name=there.node, capabilities=there.capabilities, live=live_when_its_turn_comes(there)) for there in workers
    ]
    held = (profile, *(model for there in workers for model in there.capabilities.models))
    for wanted in imagined:
        name, offered, live = hypothetical(wanted, held)
        example = _example(workers)
        offered = offered if example is None else as_offered_by(offered, example.capabilities)
        candidates.append(Candidate(name=name, capabilities=offered, live=live, is_hypothetical=True))
    job = Job(
        plan=drafted.planned.plan,
        profile=profile,
        config=drafted.config,
        requirements=requirements,
        rows=[_size(row, settings) for row in rows if row.error is None],
        rows_per_plan=ROWS_PER_PLAN,
    )
    before, untold = service.store.quotes.ahead()
    ahead = [_ahead(service, found, workers, len(candidates)) for found in before if found.sample]
    quoted = quote(job, candidates, service.store.quotes.measured(profile.digest), [found for found in ahead if found])
    return replace(quoted, plans_not_counted=quoted.plans_not_counted + untold)


def _ahead(service: Service, found: PlansAhead, workers: Sequence[WorkerView], candidates: int) -> Ahead | None:
    """Plans of other jobs as a quote counts them; whoever is imagined holds none. None without a profile: nobody takes them."""
    plan, profile = found.plan, found.plan.profile
    if profile is None:
        return None
    plans, held = found.queued_plans + found.held_plans, [found.held_rows.get(worker.worker_id, 0) for worker in workers]
    rows = found.queued_rows + sum(found.held_rows.values())
    job = Job(
        plan=plan.planned,
        profile=profile,
        config=plan.config,
        requirements=plan.requirements,
        rows=found.sample,
        rows_per_plan=max(1, -(-rows // plans)),
    )
    return Ahead(
        job=job,
        attempts=service.store.quotes.measured(profile.digest),
        plans=plans,
        queued_rows=found.queued_rows,
        held_rows=(*held, *[0] * (candidates - len(held))),
    )


def _example(workers: Sequence[WorkerView]) -> WorkerView | None:
    """The worker whose software can do most."""
    return max(workers, key=lambda worker: sum(reason is None for reason in worker.capabilities.passes.values()), default=None)


def _size(row: NewRow, settings: GenerationConfig) -> RowSize:
    return RowSize(
        prompt_bytes=prompt_bytes(row.request),
        max_new_tokens=own_limit(row.request) or settings.max_new_tokens,
        is_sampled=is_sampled(row.request, settings.temperature),
    )
