"""How long are leases in fleets of all sizes?"""

from hypothesis import given
from hypothesis import strategies as st

from ollm_service.core.leasing import BEATS_A_LEASE, lease_ms_in

_sizes = st.integers(0, 100_000)
_leases = st.integers(1_000, 3_600_000)


@given(_sizes, _leases)
def test_a_fleet_beats_at_most_fifty_times_a_second(size: int, base_ms: int) -> None:
    """However many workers there are, and never in a shorter lease than the operator's."""
    lease_ms = lease_ms_in(size, base_ms)
    interval_seconds = lease_ms / 1000 / BEATS_A_LEASE
    assert size <= 50 * interval_seconds * 1.000001
    assert lease_ms >= base_ms


@given(_sizes, _sizes, _leases)
def test_leases_grow_with_the_fleet(one: int, other: int, base_ms: int) -> None:
    """And never shrink with it."""
    small, large = sorted((one, other))
    assert lease_ms_in(small, base_ms) <= lease_ms_in(large, base_ms)


def test_small_fleets_keep_the_lease_that_was_set() -> None:
    """Up to 250 workers beat every 5 s in leases of 30 s; 1,000 every 20 s in leases of 120 s."""
    assert [lease_ms_in(size, 30_000) for size in (0, 1, 250, 251, 1_000)] == [30_000, 30_000, 30_000, 30_120, 120_000]
