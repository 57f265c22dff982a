"""When is the next heartbeat due?"""

import pytest

from workers.schedule import Schedule


@pytest.mark.parametrize("lease_seconds", [1.5, 30.0, 120.0])
def test_a_heartbeat_comes_six_times_in_a_lease(lease_seconds: float) -> None:
    """Give or take a fifth, so that a fleet that started together does not beat together."""
    schedule = Schedule(100.0)
    due = []
    for _ in range(200):
        schedule.beaten(100.0, lease_seconds=lease_seconds)
        due.append((schedule.beat_at - 100.0) / (lease_seconds / 6))
    assert 0.8 <= min(due) < 0.9
    assert 1.1 < max(due) <= 1.2
