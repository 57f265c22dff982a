"""What is an id? A prefix that says what it names and a UUIDv7 (RFC 9562), so that ids sort by the time they were made."""


def new_id(prefix: str, *, now_ms: int, random_bytes: bytes) -> str:
    """`prefix_` and 32 hex digits, from the epoch in milliseconds and 10 random bytes. Raises ValueError for other lengths."""
    if len(random_bytes) != 10:
        raise ValueError("an id takes 10 random bytes")
    value = (now_ms & (1 << 48) - 1) << 80 | int.from_bytes(random_bytes, "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return f"{prefix}_{value:032x}"
