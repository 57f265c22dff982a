"""What does a coordinator do again and again? Reap lost leases, and sweep: expire, plan anew, explain why plans wait, hint.

Every turn is a set of guarded statements, so that several coordinators do no harm, and none of them holds state: a turn that
an outage broke off is made up for by the next one.
"""

import logging
import threading
import time
from collections.abc import Callable

from ollm_service.coordinator.models import want_downloads
from ollm_service.coordinator.replanning import replan_stale
from ollm_service.coordinator.service import Service
from ollm_service.coordinator.waiting import tend_backlog
from ollm_service.core.errors import DatabaseUnavailable

REAP_SECONDS = 2.0
SWEEP_SECONDS = 5.0
ENDED_AT_ONCE = 100
REMEMBER_MS = 7 * 24 * 3600 * 1000
_log = logging.getLogger(__name__)


class Loop:
    """A thread that takes a turn every so many seconds until it is stopped.

    It outlives every error of a turn. `recover` runs before the first turn and before the first one after an outage of the
    database.
    """

    def __init__(
        self, name: str, seconds: float, turn: Callable[[], object], recover: Callable[[], object] | None = None
    ) -> None:
        self.name = name
        self._seconds = seconds
        self._turn = turn
        self._recover = recover
        self._must_recover = recover is not None
        self._is_up = True
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Take the first turn at once, in the loop's own thread."""
        self._thread.start()

    def stop(self, *, timeout: float) -> None:
        """Take no further turn, and wait up to `timeout` seconds for the one that is under way."""
        self._stopped.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            self._take_turn()
            self._stopped.wait(max(0.0, self._seconds - (time.monotonic() - began)))

    def _take_turn(self) -> None:
        try:
            if self._must_recover and self._recover is not None:
                self._recover()
                self._must_recover = False
            self._turn()
        except DatabaseUnavailable as error:
            if self._is_up:
                _log.warning("database-down", extra={"loop": self.name, "error": error.message})
            self._is_up, self._must_recover = False, True
        except Exception:  # noqa: BLE001 - a loop that ends would leave lost plans leased for ever, and nobody would see it
            _log.exception("turn-failed", extra={"loop": self.name})
        else:
            if not self._is_up:
                _log.info("database-up", extra={"loop": self.name})
            self._is_up = True


class Upkeep:
    """The loops of one coordinator."""

    def __init__(self, service: Service, *, reap_seconds: float = REAP_SECONDS, sweep_seconds: float = SWEEP_SECONDS) -> None:
        self._loops = (
            Loop("reap", reap_seconds, lambda: reap(service), recover=service.store.leases.hold_off_reaping),
            Loop("sweep", sweep_seconds, lambda: sweep(service)),
        )

    def start(self) -> None:
        """Start every loop."""
        for loop in self._loops:
            loop.start()

    def stop(self, *, timeout: float = 5.0) -> None:
        """End every loop; a turn that hangs on a dead database is left behind after `timeout` seconds."""
        for loop in self._loops:
            loop.stop(timeout=timeout)


def reap(service: Service) -> int:
    """Take every plan and every download back whose lease has run out; how many plans. Raises DatabaseUnavailable."""
    total = 0
    while not service.stopping.is_set():
        reaped = service.store.leases.reap(ENDED_AT_ONCE)
        total += reaped
        if reaped < ENDED_AT_ONCE:
            break
    if total:
        _log.info("plans-reaped", extra={"plans": total})
    downloads = service.store.downloads.reap(ENDED_AT_ONCE)
    if downloads:
        _log.info("downloads-reaped", extra={"downloads": downloads})
    return total


def sweep(service: Service) -> None:
    """End what is past its deadline, plan anew what waits for an older fleet, ask for models that nobody has, say why plans wait,
    hint again, forget what is old.

    Raises DatabaseUnavailable.
    """
    while service.store.leases.expire(ENDED_AT_ONCE) == ENDED_AT_ONCE and not service.stopping.is_set():
        pass  # there are more
    fleet = service.fleet.fresh()
    replan_stale(service, fleet)
    backlog = service.store.fleet.backlog()
    want_downloads(service, fleet, backlog)
    tend_backlog(service, fleet, backlog)
    service.store.fleet.forget_gone(REMEMBER_MS)
    service.store.quotes.forget_previews(REMEMBER_MS)
    service.store.downloads.forget(REMEMBER_MS)
