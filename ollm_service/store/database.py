"""Where does one get at everything that is remembered?"""

import random
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, select

from ollm_service.store.columns import now_ms
from ollm_service.store.downloads import Downloads
from ollm_service.store.engine import BUSY_MS, Database, parse_url
from ollm_service.store.events import Events
from ollm_service.store.fleet import Fleet
from ollm_service.store.jobs import Jobs
from ollm_service.store.leases import Leases
from ollm_service.store.quotes import Quotes
from ollm_service.store.results import Results
from ollm_service.store.schema import check_is_current, upgrade

__all__ = ["LEASE_MS", "Store", "open_database", "upgrade"]

LEASE_MS = 30_000


def open_database(url: str, *, lease_ms: int = LEASE_MS, draw: Callable[[], float] = random.random) -> "Store":
    """Open a database whose schema is current; `draw` gives the jitter of retries, in [0, 1).

    Raises DatabaseUnavailable when nobody answers, MisconfiguredService when the URL is wrong or the schema needs an upgrade.
    """
    database = Database(parse_url(url))
    try:
        check_is_current(database)
    except BaseException:
        database.close()
        raise
    return Store(database, lease_ms=lease_ms, draw=draw)


class Store:
    """Everything that is remembered, by use. Thread-safe; close it when done."""

    def __init__(self, database: Database, *, lease_ms: int, draw: Callable[[], float]) -> None:
        self._database = database
        self.lease_ms = lease_ms
        self.jobs = Jobs(database)
        self.leases = Leases(database, lease_ms=lease_ms, draw=draw)
        self.results = Results(database)
        self.fleet = Fleet(database)
        self.events = Events(database)
        self.quotes = Quotes(database)
        self.downloads = Downloads(database, lease_ms=lease_ms, draw=draw)
        self._changes = _SqliteChanges(Path(database.url.database or "")) if database.is_sqlite else None

    @property
    def name(self) -> str:
        """Where the database is, without the password."""
        return self._database.name

    def ping(self) -> None:
        """Raises DatabaseUnavailable when the database does not answer."""
        self.now_ms()

    def now_ms(self) -> int:
        """The database's clock, in epoch milliseconds."""

        def work(connection: Connection) -> int:
            return int(connection.execute(select(now_ms())).scalar_one())

        return self._database.read(work)

    def change_token(self) -> int:
        """A number that differs from the last one when somebody else has committed; cheap. Always 0 on PostgreSQL."""
        return 0 if self._changes is None else self._changes.token()

    def close(self) -> None:
        """Close every connection."""
        if self._changes is not None:
            self._changes.close()
        self._database.close()


class _SqliteChanges:
    """SQLite counts, for each connection, the commits of all others: this one never writes, so it sees them all."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=BUSY_MS / 1000, check_same_thread=False, isolation_level=None)

    def token(self) -> int:
        with self._lock:
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._connection.close()
