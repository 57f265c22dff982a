"""Which queued plans would be planned otherwise on today's fleet? Each of them is, while nobody has it."""

import logging
from dataclasses import dataclass

from ollm_service.coordinator.drafting import Draft, draft
from ollm_service.coordinator.fleet import Snapshot
from ollm_service.coordinator.service import Service
from ollm_service.core.errors import RequestError
from ollm_service.core.options import RuntimeConfig
from ollm_service.store.views import PlanView, UnreadablePlan

PLANS_AT_ONCE = 200
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Question:
    """What decides a draft; plans that ask the same share the answer."""

    model: str
    config: RuntimeConfig
    where: str | None
    digest: str | None


def replan_stale(service: Service, fleet: Snapshot) -> int:
    """Plan every queued plan again that was planned for an older fleet; how many changed. Raises DatabaseUnavailable."""
    answers: dict[_Question, Draft | None] = {}
    changed = 0
    while not service.stopping.is_set():
        found = service.store.jobs.stale_plans(fleet.inventory_seq, PLANS_AT_ONCE)
        stale = [view for view in found if isinstance(view, PlanView)]
        settled = [view.plan_id for view in stale if not _differs(view, _answer(view, fleet, answers))]
        for unreadable in (view for view in found if isinstance(view, UnreadablePlan)):
            # It stays as it is until a worker claims it, which ends it.
            _log.warning("plan-unreadable", extra={"plan_id": unreadable.plan_id, "error": unreadable.error})
            settled.append(unreadable.plan_id)
        moved = service.store.jobs.mark_planned(settled, fleet.inventory_seq) if settled else 0
        for view in stale:
            drafted = _answer(view, fleet, answers)
            if drafted is not None and _differs(view, drafted):
                moved += _replan(service, view.plan_id, drafted)
                changed += 1
        # Plans that were claimed, or looked at by another coordinator, meanwhile are not ours to try again at once.
        if len(found) < PLANS_AT_ONCE or not moved:
            break
    if changed:
        _log.info("plans-replanned", extra={"plans": changed, "inventory_seq": fleet.inventory_seq})
    return changed


def _answer(view: PlanView, fleet: Snapshot, answers: dict[_Question, Draft | None]) -> Draft | None:
    """How the plan would be made today; None where it could not be made: it stays as it is and waits for its model.

    Of several models under its name it stays with the one that it has, so that one model answers the whole job.
    """
    needs = view.requirements
    question = _Question(model=view.model, config=view.config, where=needs.where, digest=needs.model_digest)
    if question not in answers:
        try:
            answers[question] = draft(fleet, question.model, question.config, question.where, preferred_digest=question.digest)
        except RequestError:
            answers[question] = None
    return answers[question]


def _differs(view: PlanView, drafted: Draft | None) -> bool:
    """Whether to store the new plan. One model answers all rows of a plan: once a row is recorded, its weights are settled."""
    if drafted is None or drafted.requirements is None:
        return False
    if view.rows_done > view.rows_failed and drafted.requirements != view.requirements:
        return False
    if (drafted.requirements, drafted.planned.profile) != (view.requirements, view.profile):
        return True
    # How many workers have the model stands beside the plan, not in it, and is no reason to write.
    return drafted.planned.plan.as_dict() != view.planned.as_dict()


def _replan(service: Service, plan_id: str, drafted: Draft) -> bool:
    return service.store.jobs.replan(
        plan_id,
        runtime_plan=drafted.planned.plan,
        profile=drafted.planned.profile,
        requirements=drafted.demand_executable(),
        condition=drafted.condition,
        inventory_seq=drafted.fleet.inventory_seq,
    )
