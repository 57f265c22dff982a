"""Do the private servers of the tests start, die and come back as they promise?"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from kombu import Connection
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.conftest import OutsideConnection
from tests.servers import Blackhole, MissingServer, PostgresServer, RabbitServer, RedisServer, Server, refused_port
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]


def run_sql(url: str, statement: str) -> list[tuple[object, ...]]:
    """The rows of one statement in its own connection and transaction."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        result = connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


def redis_value(server: RedisServer) -> bytes | None:
    """What the one key of these tests holds."""
    with redis.Redis.from_url(server.url) as client:
        value = client.get("key")
    assert value is None or isinstance(value, bytes)
    return value


def set_redis_value(server: RedisServer) -> None:
    """Give the one key of these tests a value."""
    with redis.Redis.from_url(server.url) as client:
        client.set("key", "value")


def test_postgres_keeps_committed_rows_through_a_kill_and_a_restart() -> None:
    """A killed PostgreSQL comes back on the same URL with every committed row."""
    with PostgresServer() as server:
        url = server.create_database()
        run_sql(url, "CREATE TABLE kept (id integer)")
        run_sql(url, "INSERT INTO kept VALUES (1)")
        server.kill()
        assert not server.is_running
        server.start()
        run_sql(url, "INSERT INTO kept VALUES (2)")
        server.restart()
        assert run_sql(url, "SELECT id FROM kept ORDER BY id") == [(1,), (2,)]
    assert not server.directory.exists()


def test_a_postgres_database_copies_its_template(postgres_server: PostgresServer) -> None:
    """A database made from a template holds the template's tables, and dropping it leaves the template alone."""
    template = postgres_server.create_database()
    run_sql(template, "CREATE TABLE copied (id integer)")
    copy = postgres_server.create_database(template=template)
    assert run_sql(copy, "SELECT count(*) FROM copied") == [(0,)]
    postgres_server.drop_database(copy)
    assert run_sql(template, "SELECT count(*) FROM copied") == [(0,)]


def test_every_test_gets_an_empty_database(database_url: str) -> None:
    """The shared fixture hands out a database in which nothing exists yet, on either system."""
    run_sql(database_url, "CREATE TABLE only_mine (id integer)")
    assert run_sql(database_url, "SELECT count(*) FROM only_mine") == [(0,)]


def test_a_killed_redis_loses_everything_by_default() -> None:
    """Without persistence a killed Redis comes back empty."""
    with RedisServer() as server:
        set_redis_value(server)
        server.kill()
        server.start()
        assert redis_value(server) is None


def test_a_killed_redis_keeps_what_its_append_only_file_holds() -> None:
    """With the append-only file a killed Redis comes back with what was written."""
    with RedisServer(appendonly=True) as server:
        set_redis_value(server)
        server.kill()
        server.start()
        assert redis_value(server) == b"value"


@pytest.mark.slow
def test_rabbitmq_carries_messages_and_comes_back_after_a_kill(rabbit_server: RabbitServer) -> None:
    """RabbitMQ hands a message over, and a killed node takes connections again after a start."""
    with Connection(rabbit_server.url) as connection, connection.SimpleQueue("mine") as queue:
        queue.put({"hello": "world"})
        assert queue.get(timeout=10).payload == {"hello": "world"}
    rabbit_server.kill()
    rabbit_server.start()
    with Connection(rabbit_server.url) as connection:
        connection.connect()


def test_a_blackhole_accepts_and_stays_silent() -> None:
    """A connection to the blackhole succeeds, and nothing ever comes back."""
    with Blackhole() as hole, socket.create_connection(("127.0.0.1", hole.port), timeout=5) as connection:
        connection.sendall(b"PING\r\n")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_a_refused_port_refuses() -> None:
    """Nobody listens on a refused port."""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", refused_port()), timeout=5)


def test_connections_leave_the_machine_never() -> None:
    """A connection to an address that is not loopback is stopped before a packet leaves."""
    with socket.socket() as outside, pytest.raises(OutsideConnection):
        outside.connect(("192.0.2.1", 80))


def test_a_server_that_cannot_start_shows_its_log() -> None:
    """A server that ends at its start is reported with what it wrote, not as a timeout."""

    class Broken(Server):
        program = "broken"

        def _command(self) -> list[str]:
            return ["sh", "-c", "echo no configuration; exit 1"]

        def _answers(self) -> bool:
            return False

    server = Broken()
    with pytest.raises(AssertionError, match="no configuration"):
        server.start()
    server.close()


def test_a_server_dies_with_the_test_run_that_started_it(tmp_path: Path) -> None:
    """Killing the process that started a server with SIGKILL ends the server, too."""
    program = "from tests.servers import RedisServer; s = RedisServer(); s.start(); print(s.port, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as owner:  # fmt: skip
        assert owner.stdout is not None
        line = owner.stdout.readline()
        owner.kill()
    if not line:
        raise MissingServer("redis-server")
    wait_for(lambda: not _listens(int(line)), timeout=10, what="the orphaned Redis to end")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(("ci", "code", "words"), [("", 0, "NOT EVERYTHING WAS TESTED"), ("1", 1, "MissingServer")])
def test_a_missing_server_skips_loudly_and_fails_in_ci(ci: str, code: int, words: str) -> None:
    """Where redis-server is not installed its tests are skipped with a loud summary, and fail when CI is set."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "append_only", str(Path(__file__))],
        env={**os.environ, "PATH": "/nonexistent", "CI": ci}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == code, run.stdout
    assert words in run.stdout


def test_waiting_names_what_did_not_happen() -> None:
    """A wait in vain ends at its timeout and says for what it waited."""
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"waited 0\.1 s in vain for the moon; last seen: 0"):
        wait_for(lambda: 0, timeout=0.1, what="the moon")
    assert time.monotonic() - began < 5


def test_waiting_returns_what_happened() -> None:
    """A wait returns the first truthy value."""
    values = iter([None, "", "there"])
    assert wait_for(lambda: next(values), timeout=5, what="a value") == "there"
