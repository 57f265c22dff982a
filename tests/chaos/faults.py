"""What breaks when? A schedule of faults that a seed fixes, and the hands that carry it out."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from tests.e2e.fleet import Fleet
from tests.servers import PostgresServer, RedisServer

MEAN_PAUSE_SECONDS = 1.6


class FaultKind(StrEnum):
    """The faults, each with what ends it."""

    KILL_WORKER = "kill worker"  # started again
    KILL_RUNNER = "kill runner"  # its worker starts another
    FREEZE_WORKER = "freeze worker"  # thawed
    DRAIN_WORKER = "drain worker"  # started again
    KILL_BROKER = "kill broker"  # started again, empty
    KILL_COORDINATOR = "kill coordinator"  # started again
    KILL_DATABASE = "kill database"  # started again


# How often a fault is drawn, and how long it lasts at the least and at the most, in leases.
WEIGHTS: Mapping[FaultKind, tuple[int, float, float]] = {
    FaultKind.KILL_WORKER: (4, 0.0, 1.0),
    FaultKind.KILL_RUNNER: (4, 0.0, 0.1),
    FaultKind.FREEZE_WORKER: (4, 0.3, 2.5),
    FaultKind.DRAIN_WORKER: (2, 0.5, 1.0),
    FaultKind.KILL_BROKER: (2, 0.0, 0.8),
    FaultKind.KILL_COORDINATOR: (1, 0.0, 0.8),
    FaultKind.KILL_DATABASE: (1, 0.0, 0.5),
}
WORKER_FAULTS = frozenset(kind for kind in FaultKind if kind.value.endswith(("worker", "runner")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault: when it strikes and when it is over, in seconds from the start, and the worker that it strikes."""

    at: float
    until: float
    kind: FaultKind
    node: str | None = None

    def __str__(self) -> str:
        return f"{self.at:6.2f}–{self.until:6.2f} s  {self.kind}" + (f" {self.node}" if self.node else "")


def schedule(seed: int, *, seconds: float, nodes: list[str], lease_seconds: float) -> list[Fault]:
    """The faults of a run, in order. One target suffers one fault at a time; different targets may suffer at once."""
    draw = random.Random(seed)
    kinds, weights = list(WEIGHTS), [weight for weight, _, _ in WEIGHTS.values()]
    busy_until: dict[str, float] = {}
    faults: list[Fault] = []
    at = 3.0  # something is under way by then
    while (at := at + draw.expovariate(1 / MEAN_PAUSE_SECONDS)) < seconds:
        kind = draw.choices(kinds, weights)[0]
        _, least, most = WEIGHTS[kind]
        until = at + lease_seconds * draw.uniform(least, most)
        node = draw.choice(nodes) if kind in WORKER_FAULTS else None
        target = node or kind.value
        if busy_until.get(target, 0.0) < at:
            busy_until[target] = until + 1.0
            faults.append(Fault(at=at, until=until, kind=kind, node=node))
    return faults


class Hands:
    """Carries faults out on a fleet and its servers, and mends them."""

    def __init__(self, fleet: Fleet, database: PostgresServer, broker: RedisServer) -> None:
        self._fleet, self._database, self._broker = fleet, database, broker

    def strike(self, fault: Fault) -> None:
        """Begin the fault. What has ended by itself is left alone."""
        strike: Mapping[FaultKind, Callable[[], object]] = {
            FaultKind.KILL_BROKER: self._broker.kill,
            FaultKind.KILL_DATABASE: self._database.kill,
            FaultKind.KILL_COORDINATOR: self._fleet.coordinator.kill,
        }
        if fault.node is None:
            strike[fault.kind]()
            return
        worker = self._fleet.workers[fault.node]
        if not worker.is_running:
            return
        if fault.kind is FaultKind.KILL_WORKER:
            worker.kill()
        elif fault.kind is FaultKind.DRAIN_WORKER:
            worker.terminate()
        elif fault.kind is FaultKind.FREEZE_WORKER:
            worker.freeze()
        else:
            worker.kill_any_runner()

    def mend(self, fault: Fault) -> None:
        """End the fault."""
        if fault.kind is FaultKind.KILL_BROKER:
            self._broker.start()
        elif fault.kind is FaultKind.KILL_DATABASE:
            self._database.start()
        elif fault.kind is FaultKind.KILL_COORDINATOR:
            self._fleet.coordinator.start()
        elif fault.node is not None:
            worker = self._fleet.workers[fault.node]
            if fault.kind is FaultKind.DRAIN_WORKER and worker.is_running:
                worker.kill()
            if worker.is_running:
                worker.thaw()
            else:
                worker.start()
