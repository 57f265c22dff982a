"""Are ids UUIDv7 with a prefix, in order of time?"""

import uuid

import pytest

from ollm_service.core.ids import new_id


def test_an_id_is_a_prefixed_uuid_of_version_7() -> None:
    """Version, variant and the time in milliseconds can be read back."""
    found = new_id("job", now_ms=0x0123456789AB, random_bytes=b"\xff" * 10)
    prefix, _, digits = found.partition("_")
    parsed = uuid.UUID(digits)
    assert (prefix, parsed.version, parsed.variant) == ("job", 7, uuid.RFC_4122)
    assert parsed.int >> 80 == 0x0123456789AB
    assert len(digits) == 32


def test_ids_sort_by_time_and_differ_by_chance() -> None:
    """A later id is greater whatever its random part; all 74 random bits count."""
    early = new_id("p", now_ms=1, random_bytes=b"\xff" * 10)
    assert early < new_id("p", now_ms=2, random_bytes=bytes(10))
    drawn = {new_id("p", now_ms=1, random_bytes=(1 << bit).to_bytes(10, "big")) for bit in range(80)}
    assert len(drawn) == 74 + 1


@pytest.mark.parametrize("size", [0, 9, 11])
def test_an_id_takes_ten_random_bytes(size: int) -> None:
    """Another number is a mistake of the caller."""
    with pytest.raises(ValueError, match="10 random bytes"):
        new_id("job", now_ms=0, random_bytes=bytes(size))
