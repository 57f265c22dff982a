"""How does something get into a database that no release of ours writes?"""

from sqlalchemy import text

from ollm_service.store.engine import connect, parse_url

BROKEN = '{"priv'


def spoil(url: str, table: str, column: str, row_id: str) -> None:
    """Make one row's JSON in this column end early."""
    key = {"jobs": "id", "runtime_plans": "id", "plan_classes": "class_id", "workers": "id"}[table]
    engine = connect(parse_url(url))
    with engine.begin() as connection:
        statement = text(f"UPDATE {table} SET {column} = :broken WHERE {key} = :row")
        assert connection.execute(statement, {"broken": BROKEN, "row": row_id}).rowcount == 1
    engine.dispose()
