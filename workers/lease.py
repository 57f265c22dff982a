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
    """One lease as this worker sees it. The agent renews it, the attempt reads it; single assignments, so no lock.

    `seconds` is what the store was asked for, by the claim and then by each renewal.
    """

    def __init__(self, lease_id: str, *, seconds: float, sent_at: float) -> None:
        self.lease_id = lease_id
        self.is_cancelled = False
        self._term = (sent_at, seconds)  # of one renewal, always together
        self._seen_at = sent_at
        self._is_lost = False

    @property
    def seconds(self) -> float:
        """How long it lasts from when its claim or renewal was sent."""
        return self._term[1]

    def renewed(self, sent_at: float, *, seconds: float) -> None:
        """A renewal for so long, sent at that time, was granted."""
        self._term = max(self._term, (sent_at, seconds))

    def lose(self) -> None:
        """The store says that it holds nothing any more."""
        self._is_lost = True

    def attended(self, now: float) -> None:
        """The thread that works under it is alive."""
        self._seen_at = now

    def is_attended(self, now: float) -> bool:
        """Whether its work is alive: a lease that nobody works under is not renewed."""
        return now - self._seen_at < self.seconds

    def is_lost(self, now: float) -> bool:
        """Whether the work must end."""
        return self._is_lost or self.is_too_old(now)

    def is_too_old(self, now: float) -> bool:
        """Whether the store may by now have given the plan to others, so that nothing may run on under this lease."""
        return not self._is_within(KILL_AT, now)

    def may_record(self, now: float) -> bool:
        """Whether results may still be handed in."""
        return not self._is_lost and self._is_within(STOP_RECORDING_AT, now)

    def _is_within(self, share: float, now: float) -> bool:
        sent_at, seconds = self._term
        return now - sent_at < share * seconds
