"""How long may this worker still act on a lease? It trusts its own clock, from when it *sent* the last renewal that was granted.

Two thirds into the lease it stops recording, at nine tenths the work is killed; the database's clock decides in the end, and
every write is guarded there. The clock also runs while the machine is suspended.
"""

import time

STOP_RECORDING_AT = 2 / 3
KILL_AT = 0.9


def boot_clock() -> float:
    """Seconds since the machine started, suspended time included where the system can tell."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Lease:
    """One lease as this worker sees it. The agent renews it, the attempt reads it; single assignments, so no lock."""

    def __init__(self, lease_id: str, *, seconds: float, sent_at: float) -> None:
        self.lease_id = lease_id
        self.is_cancelled = False
        self._seconds = seconds
        self._sent_at = sent_at
        self._seen_at = sent_at
        self._is_lost = False

    def renewed(self, sent_at: float) -> None:
        """A renewal sent at that time was granted."""
        self._sent_at = max(self._sent_at, sent_at)

    def lose(self) -> None:
        """The store says that it holds nothing any more."""
        self._is_lost = True

    def attended(self, now: float) -> None:
        """The thread that works under it is alive."""
        self._seen_at = now

    def is_attended(self, now: float) -> bool:
        """Whether its work is alive: a lease that nobody works under is not renewed."""
        return now - self._seen_at < self._seconds

    def is_lost(self, now: float) -> bool:
        """Whether the work must end."""
        return self._is_lost or self.is_too_old(now)

    def is_too_old(self, now: float) -> bool:
        """Whether the store may by now have given the plan to others, so that nothing may run on under this lease."""
        return now - self._sent_at >= KILL_AT * self._seconds

    def may_record(self, now: float) -> bool:
        """Whether results may still be handed in."""
        return not self._is_lost and now - self._sent_at < STOP_RECORDING_AT * self._seconds
