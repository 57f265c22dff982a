"""Is the schema that the migrations make the one that the code expects?"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

from ollm_service.core.errors import DatabaseUnavailable, MisconfiguredService
from ollm_service.store.database import Store, open_database
from ollm_service.store.engine import connect, parse_url
from ollm_service.store.schema import alembic_config, upgrade
from ollm_service.store.tables import metadata
from tests.servers import refused_port
from tests.store.samples import new_job

PLAN_STATES = (
    "plan_id, job_id, model, execution_state, condition, backend_id, support_level, specialization_state, planned_passes, "
    "applied_passes, fallback_reason, worker_node, attempt, rows_total, rows_done, rows_failed, queued_at, started_at, "
    "finished_at"
)


def test_migrations_and_tables_agree(store_url: str) -> None:
    """What the migrations made is what the tables say, to the last column."""
    engine = connect(parse_url(store_url))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        made = {index["name"] for table in metadata.tables for index in inspect(connection).get_indexes(table)}
    engine.dispose()
    assert {str(index.name) for table in metadata.tables.values() for index in table.indexes} <= made


def test_the_views_keep_their_columns(store_url: str) -> None:
    """Others read these columns: add freely, rename none."""
    engine = connect(parse_url(store_url))
    with engine.connect() as connection:
        views = inspect(connection)
        assert [column["name"] for column in views.get_columns("plan_states")][:19] == PLAN_STATES.split(", ")
        fleet = {"worker_id", "node", "state", "devices", "passes", "warm_model", "running_plans", "heartbeat_age_ms"}
        assert fleet <= {column["name"] for column in views.get_columns("worker_fleet")}
        progress = {"job_id", "state", "rows_total", "rows_pending", "completion_tokens", "tokens_per_second"}
        assert progress <= {column["name"] for column in views.get_columns("job_progress")}
    engine.dispose()


def test_upgrades_at_once_do_it_once(database_url: str) -> None:
    """Four processes that start together on an empty database all find it ready."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(upgrade, [database_url] * 4))
    open_database(database_url).close()


def test_an_upgrade_makes_the_folder(tmp_path: Path) -> None:
    """An embedded service starts from nothing."""
    url = f"sqlite:///{tmp_path}/new/folder/ollm.db"
    upgrade(url)
    store = open_database(url)
    store.ping()
    store.close()


def test_the_first_migration_can_be_taken_back(database_url: str) -> None:
    """Downgrading leaves nothing but Alembic's own table."""
    upgrade(database_url)
    engine = connect(parse_url(database_url))
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    assert inspect(engine).get_view_names() == []
    engine.dispose()
    upgrade(database_url)


def test_history_cannot_be_rewritten(store: Store, store_url: str) -> None:
    """Events are appended, never changed or deleted, not even by hand."""
    store.jobs.submit(new_job())
    engine = connect(parse_url(store_url))
    for statement in ("UPDATE plan_events SET kind = 'x'", "DELETE FROM plan_events"):
        with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(text(statement))
    engine.dispose()
    assert [event.kind for event in store.events.page("default")] == ["submit"]


def test_the_reader_sees_views_and_nothing_else(store: Store, store_url: str) -> None:
    """On PostgreSQL a role for monitoring may read the three views, no table, and write nothing."""
    store.jobs.submit(new_job())
    if store_url.startswith("sqlite"):
        return
    engine = connect(parse_url(store_url))
    with engine.connect() as connection:
        connection.execute(text("SET ROLE ollm_reader"))
        for view in ("plan_states", "worker_fleet", "job_progress"):
            connection.execute(text(f"SELECT * FROM {view}"))
    for statement in ("SELECT * FROM job_rows", "SELECT * FROM runtime_plans", "DELETE FROM plan_states"):
        with engine.connect() as connection:
            connection.execute(text("SET ROLE ollm_reader"))
            with pytest.raises(DBAPIError, match="permission denied"):
                connection.execute(text(statement))
    engine.dispose()


def test_a_schema_that_is_not_there_is_named(database_url: str) -> None:
    """Opening says what to run; so does a SQLite file that does not exist, which is not created by looking."""
    with pytest.raises(MisconfiguredService, match="db upgrade") as raised:
        open_database(database_url)
    assert raised.value.remedy == "Run `ollm-service db upgrade`."
    if database_url.startswith("sqlite"):
        assert not Path(parse_url(database_url).database or "").exists()


def test_a_schema_of_another_version_is_refused(store_url: str) -> None:
    """An old program does not write into a newer schema."""
    engine = connect(parse_url(store_url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(MisconfiguredService, match="9999"):
        open_database(store_url)


@pytest.mark.parametrize("url", ["mysql://x/y", "not a url", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused(url: str) -> None:
    """Only SQLite in a file and PostgreSQL work, and the message says so."""
    with pytest.raises(MisconfiguredService):
        open_database(url)


def test_nobody_there_is_said_without_the_password() -> None:
    """A refused connection is DatabaseUnavailable, within seconds, and names the server but not the secret."""
    with pytest.raises(DatabaseUnavailable, match="cannot be reached") as raised:
        open_database(f"postgresql://user:s3cret@127.0.0.1:{refused_port()}/ollm")
    assert "s3cret" not in str(raised.value)
