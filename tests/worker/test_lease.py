"""How long does a worker trust its lease?"""

import pytest

from workers.lease import Lease, boot_clock


@pytest.mark.parametrize(
    ("age", "may_record", "is_lost"),
    [(0.0, True, False), (19.9, True, False), (20.0, False, False), (26.9, False, False), (27.0, False, True)],
)
def test_recording_stops_before_the_work_is_killed(age: float, may_record: bool, is_lost: bool) -> None:
    """Of 30 seconds, recording ends after 20 and the work after 27, counted from when the renewal was sent."""
    lease = Lease("l", seconds=30.0, sent_at=100.0)
    assert lease.may_record(100.0 + age) is may_record
    assert lease.is_lost(100.0 + age) is is_lost


def test_a_renewal_counts_from_when_it_was_sent() -> None:
    """A slow answer gives no more time, and a late answer to an older renewal takes none away."""
    lease = Lease("l", seconds=30.0, sent_at=0.0)
    lease.renewed(15.0)
    lease.renewed(10.0)
    assert lease.may_record(34.9)
    assert not lease.may_record(35.0)


def test_a_lost_lease_stays_lost() -> None:
    """What the store has said once is not undone by a renewal on its way."""
    lease = Lease("l", seconds=30.0, sent_at=0.0)
    lease.lose()
    lease.renewed(1.0)
    assert lease.is_lost(1.0)
    assert not lease.may_record(1.0)


def test_a_lease_that_nobody_works_under_is_not_renewed() -> None:
    """A thread that hangs lets its lease run out, so that others get the plan."""
    lease = Lease("l", seconds=30.0, sent_at=0.0)
    lease.attended(10.0)
    assert lease.is_attended(39.9)
    assert not lease.is_attended(40.0)


def test_the_clock_goes_forward() -> None:
    """Two looks never go back."""
    assert boot_clock() <= boot_clock()
