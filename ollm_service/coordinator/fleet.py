"""What does the fleet hold, and who of it can take a plan?"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ollm_service.core.capabilities import LiveState
from ollm_service.core.known_devices import FREE_SHARE
from ollm_service.core.matching import Match, match
from ollm_service.core.requirements import Requirements
from ollm_service.core.resolution import HeldModel
from ollm_service.store.database import Store
from ollm_service.store.jobs import MODEL_NOT_PRESENT, NO_CAPABLE_WORKER
from ollm_service.store.views import WorkerView

KEPT_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The fleet at one moment: its active workers, their usable models, and the number of this state of the models."""

    inventory_seq: int
    models: tuple[HeldModel, ...]
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one worker can take a plan; the reasons are why it cannot, none where it can."""

    worker_id: str
    node: str
    is_eligible: bool
    reasons: tuple[str, ...]


class Fleet:
    """The fleet as the database knows it. Thread-safe.

    Reading capabilities costs about a millisecond a worker, so a snapshot is kept until a worker comes, goes or has other models,
    and for a second at the most: that is how old what it says of labels or running plans may be.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: tuple[float, Snapshot] | None = None

    def snapshot(self) -> Snapshot:
        """The fleet, mostly at the price of one row. Raises DatabaseUnavailable."""
        with self._lock:
            kept = self._kept
        is_young = kept is not None and time.monotonic() - kept[0] < KEPT_SECONDS
        if kept is not None and is_young and kept[1].inventory_seq == self._store.fleet.inventory_seq():
            return kept[1]
        return self.fresh()

    def fresh(self) -> Snapshot:
        """The fleet as it is now. Raises DatabaseUnavailable."""
        began = time.monotonic()
        seq, models = self._store.fleet.inventory()
        snapshot = Snapshot(inventory_seq=seq, models=models, workers=tuple(self._store.fleet.workers()))
        with self._lock:
            if self._kept is None or self._kept[0] <= began:
                self._kept = (began, snapshot)
        return snapshot


def verdicts(requirements: Requirements, workers: Iterable[WorkerView]) -> tuple[Verdict, ...]:
    """Every worker's verdict."""
    return tuple(_verdict(requirements, worker) for worker in workers)


def _verdict(requirements: Requirements, worker: WorkerView) -> Verdict:
    found = match(requirements, worker.capabilities)
    reasons = () if isinstance(found, Match) else found.reasons
    return Verdict(worker_id=worker.worker_id, node=worker.node, is_eligible=not reasons, reasons=reasons)


def capable(requirements: Requirements, workers: Iterable[WorkerView]) -> tuple[WorkerView, ...]:
    """The workers that satisfy the requirements."""
    return tuple(worker for worker in workers if isinstance(match(requirements, worker.capabilities), Match))


def absence(requirements: Requirements) -> str:
    """The condition of a plan that no worker satisfies: its model is nowhere, or something else is missing."""
    return MODEL_NOT_PRESENT if requirements.download else NO_CAPABLE_WORKER


def live_when_its_turn_comes(worker: WorkerView) -> LiveState:
    """What a worker has free when it takes a plan: of one that runs something now nearly all, as that ends before."""
    if not worker.running:
        return worker.live
    live, offered = worker.live, worker.capabilities
    free = {device.device_id: int(device.memory_bytes * FREE_SHARE) for device in offered.devices}
    return replace(
        live,
        device_free_bytes={name: max(live.device_free_bytes.get(name, 0), size) for name, size in free.items()},
        host_free_bytes=max(live.host_free_bytes, int(offered.host_memory_bytes * FREE_SHARE)),
    )
