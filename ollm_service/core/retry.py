"""After a failed attempt: try again, and when, or give up?"""

from collections.abc import Callable
from dataclasses import dataclass

MOST_FAILURES = 3
MOST_LOSSES = 3
FIRST_BACKOFF_MS = 2_000
LONGEST_BACKOFF_MS = 300_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt ended without its rows. `is_permanent`: trying again anywhere cannot help. Never holds a prompt."""

    code: str
    message: str
    is_permanent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Queue it again, not before this many milliseconds from now."""

    after_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """End it."""


def decide(failure: Failure, failures_without_progress: int, draw: Callable[[], float]) -> Retry | GiveUp:
    """What follows a failure that is the n-th since the plan last recorded a new row (n ≥ 1).

    The wait is exponential with full jitter: uniform between 0 and min(300 s, 2 s · 2^(n-1)). `draw` returns a random number
    in [0, 1).
    """
    if failure.is_permanent or failures_without_progress >= MOST_FAILURES:
        return GiveUp()
    ceiling = min(LONGEST_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** (failures_without_progress - 1))
    return Retry(after_ms=int(draw() * ceiling))
