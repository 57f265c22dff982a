"""How does time pass for a store without waiting? What was written gets older."""

from sqlalchemy import create_engine, text

from ollm_service.store.engine import parse_url

_TIMES = {
    "runtime_plans": ("lease_expires_ms", "available_ms", "deadline_ms"),
    "exclusions": ("until_ms",),
    "workers": ("heartbeat_ms",),
    "previews": ("created_ms",),
    "downloads": ("lease_expires_ms", "available_ms", "finished_ms"),
}


def let_time_pass(url: str, ms: int) -> None:
    """Move leases, back-offs, deadlines, exclusions and heartbeats `ms` into the past."""
    engine = create_engine(parse_url(url), connect_args={"timeout": 30} if url.startswith("sqlite") else {})
    with engine.begin() as connection:
        for table, columns in _TIMES.items():
            moved = ", ".join(f"{column} = {column} - :ms" for column in columns)
            connection.execute(text(f"UPDATE {table} SET {moved}"), {"ms": ms})
    engine.dispose()
