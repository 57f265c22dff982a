"""When is each of the agent's duties due? Times are seconds of the agent's clock."""

import random

from ollm_service.core.leasing import BEATS_A_LEASE

REPROBE_SECONDS = 30.0
POLL_SECONDS = (1.0, 2.0)


class Schedule:
    """The next heartbeat, the next idle claim and the next look at the machine."""

    def __init__(self, now: float) -> None:
        self.beat_at = self.poll_at = now
        self.probe_at = now + REPROBE_SECONDS
        self._token = 0

    @property
    def next_due(self) -> float:
        """The earliest of all."""
        return min(self.beat_at, self.poll_at, self.probe_at)

    def token_changed(self, token: int) -> bool:
        """Whether somebody has committed since the last look; never on a store that does not tell."""
        before, self._token = self._token, token
        return token != before

    def poll_now(self) -> None:
        """The next round claims."""
        self.poll_at = 0.0

    def polled(self, now: float) -> None:
        """Claim again after one to two seconds, not all workers at once."""
        self.poll_at = now + random.uniform(*POLL_SECONDS)

    def beaten(self, now: float, *, lease_seconds: float) -> None:
        """The next heartbeat comes a sixth of the lease later that this one asked for, give or take a fifth."""
        self.beat_at = now + lease_seconds / BEATS_A_LEASE * random.uniform(0.8, 1.2)

    def probed(self, now: float) -> None:
        """The machine was looked at."""
        self.probe_at = now + REPROBE_SECONDS

    def hold_off(self, now: float, seconds: float) -> None:
        """Nothing before that."""
        self.beat_at, self.poll_at = max(self.beat_at, now + seconds), max(self.poll_at, now + seconds)
