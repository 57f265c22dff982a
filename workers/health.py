"""Is the worker of this machine alive? A program for health checks: `python -m workers.health`, set up like the worker itself.

It asks the fleet's register, not the process table: a worker that hangs, or cannot reach the database, is not healthy. Exit
codes: 0 when the node has a worker whose heartbeat is younger than a lease of this fleet, 1 otherwise, 2 when a setting is wrong.
"""

import contextlib
import sys
from collections.abc import Iterable

from ollm_service.core.errors import MisconfiguredService, OllmError
from ollm_service.core.leasing import lease_ms_in
from ollm_service.settings import Settings
from ollm_service.store.database import open_database
from ollm_service.store.views import WorkerView


def has_live_worker(workers: Iterable[WorkerView], node: str, lease_ms: int) -> bool:
    """Whether one of the workers, active or draining, is on `node` and was heard of within a lease."""
    return any(worker.node == node and worker.state != "gone" and worker.heartbeat_age_ms < lease_ms for worker in workers)


def main() -> int:
    """Look once; the exit code."""
    try:
        settings = Settings.load()
        lease_ms = round(settings.lease_seconds * 1000)
        with contextlib.closing(open_database(settings.effective_database_url, lease_ms=lease_ms)) as store:
            workers = store.fleet.workers(active_only=False, gone=False)
    except OllmError as error:
        sys.stderr.write(f"{error.message}\n")
        return 2 if isinstance(error, MisconfiguredService) else 1
    lease_ms = lease_ms_in(len(workers), lease_ms)
    if has_live_worker(workers, settings.effective_node, lease_ms):
        return 0
    sys.stderr.write(f"No worker of node {settings.effective_node} was heard of in the last {lease_ms / 1000:g} s.\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
