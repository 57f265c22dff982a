"""How long does a worker trust its lease?"""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    lease.renewed(15.0, seconds=30.0)
    lease.renewed(10.0, seconds=30.0)
    assert lease.may_record(34.9)
    assert not lease.may_record(35.0)


def test_a_renewal_brings_its_own_length() -> None:
    """In a growing fleet leases grow; what was asked for before does not count any more."""
    lease = Lease("l", seconds=30.0, sent_at=0.0)
    lease.renewed(5.0, seconds=120.0)
    assert lease.may_record(84.9)
    assert not lease.may_record(85.0)
    assert not lease.is_lost(112.9)
    assert lease.is_lost(113.0)
    assert lease.is_attended(119.9)


@dataclass(frozen=True, slots=True)
class _Renewal:
    """One renewal: seconds since the one before, on its way, and asked for; whether its answer arrives."""

    after: float
    travels: float
    seconds: float
    is_answered: bool


_seconds = st.floats(0, 60, allow_nan=False)
_lengths = st.sampled_from([30.0, 120.0, 600.0])
_renewals = st.lists(st.builds(_Renewal, _seconds, _seconds, _lengths, st.booleans()), max_size=8)


@given(_renewals, _seconds, _lengths)
def test_no_lease_is_trusted_longer_than_the_database_keeps_it(renewals: list[_Renewal], delay: float, first: float) -> None:
    """However leases grow and shrink, however late a renewal arrives, and whether its answer comes back or not."""
    lease, now, kept_until = Lease("l", seconds=first, sent_at=0.0), delay, delay + first
    for renewal in renewals:
        sent_at = now + renewal.after
        now = sent_at + renewal.travels
        if now >= kept_until:
            break  # it was reaped before the renewal came
        kept_until = max(kept_until, now + renewal.seconds)  # as the heartbeat's UPDATE does
        if renewal.is_answered:
            lease.renewed(sent_at, seconds=renewal.seconds)
        assert lease.is_lost(kept_until)
    assert lease.is_lost(kept_until)
    assert not lease.may_record(kept_until)


def test_a_lost_lease_stays_lost() -> None:
    """What the store has said once is not undone by a renewal on its way."""
    lease = Lease("l", seconds=30.0, sent_at=0.0)
    lease.lose()
    lease.renewed(1.0, seconds=30.0)
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
