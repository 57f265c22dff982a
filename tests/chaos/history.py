"""What does the database say happened? Everything that the checker looks at, read once, after the fact."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy

Row = Mapping[str, Any]

_QUERIES = {
    "jobs": "SELECT id, row_count, seq, succeeded, failed, prompt_tokens, completion_tokens FROM jobs",
    "rows": "SELECT job_id, row, plan_id FROM job_rows",
    "plans": "SELECT id, job_id, state, attempt, lease_id, row_count, rows_done, rows_failed FROM runtime_plans",
    "results": "SELECT job_id, row, seq, plan_id, attempt, text, error_code, prompt_tokens, completion_tokens, created_ms "
    "FROM results",
    "attempts": "SELECT plan_id, number, lease_id, worker_id, worker_node, outcome, started_ms, ended_ms FROM attempts",
    "events": "SELECT id, plan_id, at_ms, kind, from_state, to_state, worker_id FROM plan_events ORDER BY id",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The tables that matter, as plain rows; events in the order of their ids."""

    jobs: tuple[Row, ...] = ()
    rows: tuple[Row, ...] = ()
    plans: tuple[Row, ...] = ()
    results: tuple[Row, ...] = ()
    attempts: tuple[Row, ...] = ()
    events: tuple[Row, ...] = ()


@dataclass(slots=True, kw_only=True)
class Acknowledged:
    """One job as its user knows it: how many rows were accepted, who may run it, and which results were read so far.

    `nodes` empty: any node may. `seen` maps a cursor to the row and the text that a reader was given there.
    """

    row_count: int
    nodes: frozenset[str] = frozenset()
    seen: dict[int, tuple[int, str | None]] = field(default_factory=dict)


def read_history(database_url: str) -> History:
    """All of it. Raises sqlalchemy.exc.OperationalError when the database is away."""
    engine = sqlalchemy.create_engine(database_url)
    try:
        with engine.connect() as connection:
            tables = {
                name: tuple(dict(row) for row in connection.execute(sqlalchemy.text(query)).mappings())
                for name, query in _QUERIES.items()
            }
    finally:
        engine.dispose()
    results = tuple({**row, "text": None if row["text"] is None else json.loads(row["text"])} for row in tables["results"])
    return History(**{**tables, "results": results})
