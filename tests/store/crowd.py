"""How does a store get a large fleet quickly? Copies of the one worker that it has."""

from sqlalchemy import text

from ollm_service.store.engine import connect, parse_url


def multiply_workers(url: str, count: int) -> None:
    """Make the one worker that is there so many."""
    engine = connect(parse_url(url))
    with engine.begin() as connection:
        columns = [row[0] for row in connection.execute(text("SELECT * FROM workers")).cursor.description]
        source = ", ".join("id || '-' || n" if name == "id" else name for name in columns)
        numbers = "WITH RECURSIVE t(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM t WHERE n < :count) "
        connection.execute(
            text(f"INSERT INTO workers ({', '.join(columns)}) {numbers} SELECT {source} FROM workers, t"), {"count": count}
        )
    engine.dispose()
