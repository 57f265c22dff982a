"""Does a reader see one moment, whatever is written meanwhile?"""

from sqlalchemy import Connection, insert, select

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
