"""When is a failed attempt tried again?"""

import pytest

from ollm_service.core.retry import LONGEST_BACKOFF_MS, MOST_FAILURES, Failure, GiveUp, Retry, decide

FAILED = Failure(code="runner_died_loading", message="killed")


@pytest.mark.parametrize(("failures", "ceiling"), [(1, 2_000), (2, 4_000)])
def test_the_wait_doubles_with_full_jitter(failures: int, ceiling: int) -> None:
    """Anything between at once and the ceiling, as the draw falls."""
    assert decide(FAILED, failures, lambda: 0.0) == Retry(after_ms=0)
    assert decide(FAILED, failures, lambda: 0.5) == Retry(after_ms=ceiling // 2)
    assert decide(FAILED, failures, lambda: 1 - 1e-12) == Retry(after_ms=ceiling - 1)
    assert ceiling <= LONGEST_BACKOFF_MS


def test_three_failures_without_a_new_row_are_the_end() -> None:
    """So is one that is permanent."""
    assert decide(FAILED, MOST_FAILURES, lambda: 0.0) == GiveUp()
    assert decide(FAILED, 10**9, lambda: 0.0) == GiveUp()
    assert decide(Failure(code="x", message="y", is_permanent=True), 1, lambda: 0.0) == GiveUp()
