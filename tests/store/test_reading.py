"""Does a reader see one moment, whatever is written meanwhile?"""

import pytest
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from ollm_service.store.engine import Database, parse_url
from ollm_service.store.tables import counters


def test_the_statements_of_one_read_see_the_same_moment(store_url: str) -> None:
    """A job's state and its counts come from several statements; what commits between them is not seen by half."""
    database = Database(parse_url(store_url))

    def names(connection: Connection) -> set[str]:
        return set(connection.execute(select(counters.c.name)).scalars())

    def read_while_another_writes(connection: Connection) -> tuple[set[str], set[str]]:
        before = names(connection)
        database.write(lambda other: other.execute(insert(counters).values(name="between", value=1)))
        return before, names(connection)

    try:
        before, after = database.read(read_while_another_writes)
        assert before == after
        assert database.read(names) == before | {"between"}
    finally:
        database.close()


@pytest.mark.parametrize("reading", ["look", "read"])
@pytest.mark.parametrize("statement", ["SELECT 1", "SELECT no_such_column FROM counters"])
def test_a_write_after_a_read_is_one_transaction(store_url: str, reading: str, statement: str) -> None:
    """A connection that looked without a transaction, or read one moment, is then as any other, though its statement failed."""
    database = Database(parse_url(store_url))
    used: list[object] = []

    def ask(connection: Connection) -> None:
        used.append(connection.connection.dbapi_connection)
        connection.execute(text(statement))

    def write_half(connection: Connection) -> None:
        assert [connection.connection.dbapi_connection] == used
        if not database.is_sqlite:  # what is locked is then read as it was last committed
            assert connection.execute(text("SHOW transaction_isolation")).scalar_one() == "read committed"
        connection.execute(insert(counters).values(name="half", value=1))
        raise KeyError("the other half")

    try:
        try:
            getattr(database, reading)(ask)
        except SQLAlchemyError:
            assert "no_such_column" in statement
        with pytest.raises(KeyError):
            database.write(write_half)
        assert "half" not in database.read(lambda connection: set(connection.execute(select(counters.c.name)).scalars()))
    finally:
        database.close()
