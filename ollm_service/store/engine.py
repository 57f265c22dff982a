"""How do we reach the database, and what happens when that goes wrong in the middle of a transaction?

A transaction that failed before its COMMIT was sent has not happened, and is tried again. One whose COMMIT got no answer may have
happened: the caller's `recover` is asked first, on a new connection, and only if it knows of nothing the work is done again.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ollm_service.core.errors import DatabaseUnavailable, MisconfiguredService

T = TypeVar("T")

TRIES = 5
FIRST_PAUSE_SECONDS = 0.05
LONGEST_TRYING_SECONDS = 8.0  # a server that does not even refuse costs seconds a try
BUSY_MS = 10_000
POOL_SIZE = 10
# Serialization failure, deadlock, lock timeout, idle for too long in the middle of a transaction (a process that was frozen):
# the transaction has surely not happened, and trying again may well succeed.
_TRY_AGAIN_STATES = frozenset({"40001", "40P01", "55P03", "25P03"})
# The server is shutting down, starting, out of connections, memory or disk, or has dropped ours.
_GONE_STATES = ("08", "57P", "53")
_BUSY_SQLITE = ("database is locked", "database table is locked")
_FULL_SQLITE = ("database or disk is full", "disk i/o error")
_POSTGRES_ARGUMENTS: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    # Who freezes or vanishes in the middle of a transaction loses its locks before those who wait for them give up.
    "options": "-c statement_timeout=30000 -c lock_timeout=10000 -c idle_in_transaction_session_timeout=4000",
    "application_name": "ollm-service",
}


def parse_url(text: str) -> URL:
    """The database URL. Raises MisconfiguredService for anything but SQLite in a file and PostgreSQL."""
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise MisconfiguredService("The database URL cannot be parsed.", param="OLLM_DATABASE_URL") from error
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise MisconfiguredService("SQLite needs a file: sqlite:////absolute/path.db.", param="OLLM_DATABASE_URL")
        return url
    if backend != "postgresql":
        raise MisconfiguredService(
            f"`{backend}` is not supported; use sqlite:///… or postgresql+psycopg://….", param="OLLM_DATABASE_URL"
        )
    return url.set(drivername="postgresql+psycopg")


def connect(url: URL) -> Engine:
    """An engine with our settings; nothing is dialled yet. Raises MisconfiguredService where the driver is missing."""
    # Statements carry prompts and answers, which no error text may show.
    settings: dict[str, Any] = {"hide_parameters": True, "pool_size": POOL_SIZE}
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_MS / 1000}, max_overflow=-1, **settings)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    arguments = {name: value for name, value in _POSTGRES_ARGUMENTS.items() if name not in url.query}
    try:
        engine = create_engine(url, connect_args=arguments, max_overflow=20, pool_timeout=10, **settings)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise MisconfiguredService("PostgreSQL needs psycopg: pip install 'ollm-service[postgres]'.") from error
    # Many rows go as one statement with many VALUES, never as psycopg's pipeline: who freezes in the middle of one looks busy to
    # the server, is ended by no timeout, and keeps its locks.
    engine.dialect.use_insertmanyvalues_wo_returning = True
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, so that writers can say BEGIN IMMEDIATE
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class Database:
    """Transactions on one database. Thread-safe."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.engine = connect(url)

    @property
    def is_sqlite(self) -> bool:
        """Whether it is one file on this machine."""
        return self.url.get_backend_name() == "sqlite"

    @property
    def name(self) -> str:
        """Where it is, without the password."""
        return str(Path(self.url.database or "")) if self.is_sqlite else self.url.render_as_string(hide_password=True)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction that only reads, and sees one moment. Raises DatabaseUnavailable."""
        return self._run(work, _Use.READ, recover=None)

    def look(self, work: Callable[[Connection], T]) -> T:
        """Run `work` of one statement that only reads, without the round trips of a transaction. Raises DatabaseUnavailable."""
        return self._run(work, _Use.LOOK, recover=None)

    def write(self, work: Callable[[Connection], T], *, recover: Callable[[Connection], T | None] | None = None) -> T:
        """Run `work` in a transaction and commit.

        Work may run several times, so it must be a guarded statement: after a COMMIT without an answer it is either
        recognized by `recover` (which returns None when it did not happen), or harmless to repeat. Raises DatabaseUnavailable
        when the database stays away; the outcome is then unknown.
        """
        return self._run(work, _Use.WRITE, recover=recover)

    def _run(self, work: Callable[[Connection], T], use: "_Use", *, recover: Callable[[Connection], T | None] | None) -> T:
        is_unknown, began = False, time.monotonic()
        for trial in range(TRIES):
            progress = _Progress()
            try:
                with self._transaction(use, progress) as connection:
                    if is_unknown and recover is not None:
                        known = recover(connection)
                        if known is not None:
                            return known
                    return work(connection)
            except (DBAPIError, PoolTimeout) as error:
                if isinstance(error, IntegrityError) or not _is_passing(error):
                    raise
                is_unknown = is_unknown or (progress.is_committing and not _has_surely_failed(error))
                if trial == TRIES - 1 or time.monotonic() - began > LONGEST_TRYING_SECONDS:
                    raise self.unavailable(error) from error
            time.sleep(FIRST_PAUSE_SECONDS * 2**trial * (0.5 + random.random() / 2))
        raise AssertionError("unreachable: the last trial returns or raises")

    @contextmanager
    def _transaction(self, use: "_Use", progress: "_Progress") -> Iterator[Connection]:
        with self.engine.connect() as plain:
            level = {} if self.is_sqlite or use is _Use.WRITE else {"isolation_level": _LEVELS[use]}
            connection = plain.execution_options(writes=use is _Use.WRITE, **level)
            transaction = connection.begin()
            try:
                yield connection
                progress.is_committing = use is _Use.WRITE
                transaction.commit()
            except BaseException:
                if transaction.is_active and not connection.invalidated:
                    transaction.rollback()
                raise

    def unavailable(self, error: Exception) -> DatabaseUnavailable:
        """What we say about a database that does not answer."""
        cause = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        return DatabaseUnavailable(f"The database {self.name} cannot be reached: {cause}")

    def close(self) -> None:
        """Close every idle connection."""
        self.engine.dispose()


class _Use(StrEnum):
    """What a transaction is for."""

    LOOK = "look"
    READ = "read"
    WRITE = "write"


# A read of several statements sees one moment, as on SQLite: counts that sum, whatever commits in between.
_LEVELS = {_Use.LOOK: "AUTOCOMMIT", _Use.READ: "REPEATABLE READ"}


class _Progress:
    """How far a transaction came."""

    is_committing = False


def _state_of(error: Exception) -> str:
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _is_passing(error: Exception) -> bool:
    """Whether it may well succeed if tried again."""
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    state = _state_of(error)
    if error.connection_invalidated or state in _TRY_AGAIN_STATES or state.startswith(_GONE_STATES):
        return True
    message = str(error.orig).lower()
    if any(sign in message for sign in _BUSY_SQLITE + _FULL_SQLITE):
        return True
    # Without a state it is the connection that failed, not a statement.
    return type(error.orig).__name__ == "OperationalError" and not state and "psycopg" in type(error.orig).__module__


def _has_surely_failed(error: Exception) -> bool:
    return _state_of(error) in _TRY_AGAIN_STATES or "database is locked" in str(getattr(error, "orig", "")).lower()
