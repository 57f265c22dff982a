"""Why do queued plans wait, and who should be told that there is work?"""

import logging
from collections.abc import Iterable, Sequence

from ollm_service.coordinator.fleet import Snapshot, absence, capable
from ollm_service.coordinator.service import Service
from ollm_service.store.views import ClassBacklog, WorkerView

_log = logging.getLogger(__name__)


def tend_backlog(service: Service, fleet: Snapshot, backlog: Sequence[ClassBacklog]) -> None:
    """For every class with queued plans, store why they wait and hint to who is idle. Raises DatabaseUnavailable."""
    for waiting in backlog:
        if waiting.requirements is None:
            if service.store.jobs.refresh_conditions(waiting.class_id, ()):
                _log.warning("class-unreadable", extra={"class_id": waiting.class_id})
            continue
        if waiting.requirements.download is not None:  # who may fetch it cannot run it before it is planned again
            service.store.jobs.refresh_conditions(waiting.class_id, (), absent=absence(waiting.requirements))
            continue
        able = capable(waiting.requirements, fleet.workers)
        nodes = {worker.node for worker in able}
        service.store.jobs.refresh_conditions(waiting.class_id, nodes, absent=absence(waiting.requirements))
        service.hints.send(waiting.class_id, min(idle_slots(able), waiting.available))


def idle_slots(workers: Iterable[WorkerView]) -> int:
    """How many plans these workers could begin at once: as many hints are worth sending."""
    return sum(max(0, worker.capabilities.slots - worker.running) for worker in workers)
