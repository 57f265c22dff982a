"""Is the database's schema the one that this version works with, and how does it become so?"""

from importlib.resources import files
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from ollm_service.core.errors import MisconfiguredService
from ollm_service.store.engine import Database, parse_url

# The same number in every process, so that upgrades wait for each other.
_UPGRADE_LOCK = 0x6F6C6C6D


def alembic_config() -> Config:
    """Alembic's configuration: the migrations that were installed with this package."""
    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    return config


def upgrade(url: str) -> None:
    """Bring the schema to the newest version; a SQLite file and its folder are made where missing.

    Several processes may do it at once: one works and the others wait for it. All of it is one transaction. Raises
    DatabaseUnavailable and MisconfiguredService.
    """
    database = Database(parse_url(url))
    try:
        if database.is_sqlite:
            _make_folder(Path(database.url.database or ""))
        database.write(_upgrade)
    finally:
        database.close()


def _make_folder(path: Path) -> None:
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MisconfiguredService(f"The folder of {path} cannot be made: {error.strerror}.") from error


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _UPGRADE_LOCK})
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def check_is_current(database: Database) -> None:
    """Raises MisconfiguredService when the schema is missing or of another version, DatabaseUnavailable when nobody answers."""
    if database.is_sqlite and not Path(database.url.database or "").exists():
        raise _needs_upgrade(f"There is no database at {database.name}")
    try:
        current = database.read(lambda connection: MigrationContext.configure(connection).get_current_revision())
    except DBAPIError as error:
        raise database.unavailable(error) from error
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    if current != head:
        problem = "has no schema yet" if current is None else f"has schema {current}, this version needs {head}"
        raise _needs_upgrade(f"The database {database.name} {problem}")


def _needs_upgrade(problem: str) -> MisconfiguredService:
    remedy = "Run `ollm-service db upgrade`."
    return MisconfiguredService(f"{problem}. {remedy}", remedy=remedy)
