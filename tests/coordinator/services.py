"""What do tests of the coordinator and the API run? A real service on a real store, and workers that speak to that store."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ollm_service.bootstrap import make_id
from ollm_service.broker import Hints, make_celery
from ollm_service.coordinator.fleet import Fleet
from ollm_service.coordinator.service import Service
from ollm_service.coordinator.submission import Submission
from ollm_service.core.leasing import Assignment, RowError, RowResult
from ollm_service.settings import MEMORY_BROKER, Settings
from ollm_service.store.database import open_database
from tests.store.samples import REPORT, new_lease

ROWS = [{"prompt": "12+30="}, {"prompt": "1+1="}]


class NotedHints(Hints):
    """Hints that go nowhere but into a list."""

    def __init__(self) -> None:
        super().__init__(make_celery(MEMORY_BROKER))
        self.sent: list[tuple[str, int]] = []

    def send(self, class_id: str, count: int = 1) -> None:
        """Note it."""
        if count:
            self.sent.append((class_id, count))


def open_service(url: str, data_dir: Path, *, lease_ms: int = 30_000, **settings: Any) -> Service:
    """A coordinator without loops on a database that has its schema."""
    store = open_database(url, lease_ms=lease_ms, draw=lambda: 0.0)
    return Service(
        settings=Settings(data_dir=data_dir, database_url=url, **settings),
        store=store,
        hints=NotedHints(),
        fleet=Fleet(store),
        make_id=make_id,
    )


def sent_hints(service: Service) -> list[tuple[str, int]]:
    """The hints that were sent so far, as (class, count)."""
    assert isinstance(service.hints, NotedHints)
    return service.hints.sent


def submission(rows: Iterable[Any] = ROWS, **changes: Any) -> Submission:
    """A submission of two rows for the model that workers have."""
    values: dict[str, Any] = {"model": "tiny", "rows": list(rows)}
    return Submission(**(values | changes))


def claim_one(service: Service, worker_id: str) -> Assignment:
    """Lease the next plan of any class. Raises AssertionError when there is none for this worker."""
    leases = service.store.leases
    assignment = leases.claim(worker_id, new_lease(), [known.class_id for known in leases.new_classes(0)])
    assert assignment is not None, "nothing to claim"
    return assignment


def answer(service: Service, assignment: Assignment, *, errors: Mapping[int, RowError] | None = None) -> None:
    """Record a result for every row of a leased plan: an echo of its prompt, or the given error."""
    wrong = errors or {}
    results = [
        RowResult(row=row.row, error=wrong[row.row])
        if row.row in wrong
        else RowResult(row=row.row, text=f"said {row.prompt}", finish_reason="stop", prompt_tokens=3, completion_tokens=2)
        for row in assignment.rows
    ]
    service.store.leases.record(assignment.lease_id, results, REPORT)
