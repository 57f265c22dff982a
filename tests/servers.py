"""Which servers may a test start and kill? Private PostgreSQL, Redis and RabbitMQ, from the installed programs.

Rules: a server owns a new directory and free loopback ports and touches nothing else. It dies with the process that started
it (its whole tree, by the kernel). ``kill()`` is the pulled plug (SIGKILL to every process of it), ``stop()`` the orderly end,
and both may be followed by ``start()`` on the same port and directory. A program that is not installed raises MissingServer,
which ``tests/conftest.py`` turns into a skip (or, where CI is set, leaves a failure).
"""

import contextlib
import itertools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil
import psycopg
from psycopg import sql

from tests.waiting import wait_for

LOOPBACK = "127.0.0.1"
LOG_TAIL_BYTES = 2000


class MissingServer(Exception):
    """A server's program is not installed on this machine."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses.

    Drawn below the range from which the kernel takes ports for outgoing connections, so that none of those can grab it before
    its server does.
    """
    for _ in range(200):
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise AssertionError("found no free port")


def refused_port() -> int:
    """A port at which every connection is refused, since nobody listens there."""
    return free_port()


class Blackhole:
    """A TCP endpoint that accepts every connection and never answers: what a broker behind a dead network looks like."""

    def __init__(self) -> None:
        # The kernel completes handshakes for a listening socket by itself; nothing ever reads or writes.
        self._socket = socket.create_server((LOOPBACK, 0), backlog=512)
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class Server:
    """One private server process tree. Subclasses say how it is started and when it answers."""

    program = ""
    start_timeout = 30.0  # seconds
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"ollm-{self.program}-"))
        self._process: subprocess.Popen[bytes] | None = None

    # What a subclass says ------------------------------------------------------------------------

    def _command(self) -> list[str]:
        raise AssertionError("a subclass names its command")

    def _environment(self) -> Mapping[str, str]:
        return os.environ

    def _user(self) -> str | None:
        """The account the server runs under, or None for ours."""
        return None

    def _answers(self) -> bool:
        """Whether a client would be served now."""
        raise AssertionError("a subclass knows when it answers")

    # What a test calls ---------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def start(self) -> None:
        """Start and return when it answers. Raises AssertionError with the end of its log when it does not."""
        assert not self.is_running, f"{self.program} is running already"
        self._process = spawn(self._command(), log=self.log, environment=self._environment(), user=self._user())
        wait_for(self._is_up, timeout=self.start_timeout, what=f"{self.program} on port {self.port} to answer")

    def _is_up(self) -> bool:
        assert self.is_running, f"{self.program} ended at its start:\n{self._log_tail()}"
        return self._answers()

    def stop(self) -> None:
        """End in order: what it holds durably stays."""
        if self._process is None:
            return
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(timeout=self.start_timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.program} did not stop in order:\n{self._log_tail()}") from None
        self._process = None

    def kill(self) -> None:
        """SIGKILL every process of the server at once, and return when all are gone."""
        if self._process is not None:
            kill_tree(self._process)
            self._process = None

    def restart(self) -> None:
        """Stop in order, then start on the same port with the same directory."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Kill it and remove its directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _log_tail(self) -> str:
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace") if self.log.exists() else "(no log)"


class RedisServer(Server):
    """Redis. By default nothing persists: ``kill()`` and ``restart()`` lose every message; ``appendonly`` keeps them."""

    program = "redis"

    def __init__(self, *, appendonly: bool = False) -> None:
        self._binary = _find("redis-server")
        super().__init__()
        self._appendonly = appendonly

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"

    def _command(self) -> list[str]:
        appendonly = "yes" if self._appendonly else "no"
        options = {"bind": LOOPBACK, "port": str(self.port), "dir": str(self.directory), "save": "", "appendonly": appendonly}
        return [str(self._binary), *itertools.chain.from_iterable((f"--{key}", value) for key, value in options.items())]

    def _answers(self) -> bool:
        return _ask(self.port, b"PING\r\n").startswith(b"+PONG")


class RabbitServer(Server):
    """RabbitMQ: one node with its own name, cookie, ports and port mapper, so that it never meets the machine's own."""

    program = "rabbitmq"
    start_timeout = 60.0

    def __init__(self) -> None:
        # Not the wrapper in PATH: that one changes user and drops the environment.
        self._binary = _find("rabbitmq-server", Path("/usr/lib/rabbitmq/bin"))
        self._mapper_binary = _find("epmd")
        super().__init__()
        self._distribution_port = free_port()
        self._mapper_port = free_port()
        self._mapper: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{LOOPBACK}:{self.port}//"

    def _command(self) -> list[str]:
        return [str(self._binary)]

    def _environment(self) -> Mapping[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")},
            "HOME": str(self.directory),  # where the Erlang cookie is made
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_EPMD_PORT": str(self._mapper_port),
            "RABBITMQ_NODENAME": f"ollm-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": LOOPBACK,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.directory / "advanced"),
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "plugins"),
            "RABBITMQ_PID_FILE": str(self.directory / "pid"),
            # The start script then replaces itself by the Erlang machine, which thus is our child and gets our signals.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def start(self) -> None:
        if self._mapper is None:
            mapper = [str(self._mapper_binary), "-address", LOOPBACK, "-port", str(self._mapper_port)]
            self._mapper = spawn(mapper, log=self.directory / "epmd.log", environment=self._environment())
        super().start()

    def close(self) -> None:
        if self._mapper is not None:
            kill_tree(self._mapper)
            self._mapper = None
        super().close()

    def _answers(self) -> bool:
        return bool(_ask(self.port, b"AMQP\x00\x00\x09\x01"))


class PostgresServer(Server):
    """PostgreSQL with one superuser and no password. ``fsync=False`` is faster and survives ``kill()``, not a power cut."""

    program = "postgres"
    stop_signal = signal.SIGINT  # "fast shutdown": sessions are ended, then a checkpoint is written
    role = "ollm"

    def __init__(self, *, fsync: bool = True) -> None:
        self._binaries = _find("postgres", *_postgres_folders()).resolve().parent
        super().__init__()
        self._fsync = fsync
        self._names = (f"ollm_{os.getpid()}_{number}" for number in itertools.count())

    def url_of(self, database: str) -> str:
        """The SQLAlchemy URL of one of this server's databases."""
        return f"postgresql+psycopg://{self.role}@{LOOPBACK}:{self.port}/{database}"

    @property
    def url(self) -> str:
        return self.url_of("postgres")

    def create_database(self, *, template: str | None = None) -> str:
        """Create a database and return its URL. ``template`` is the URL of a database to copy; nobody may be connected to it."""
        name = next(self._names)
        source = "template1" if template is None else template.rpartition("/")[2]
        self._administer(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(source)))
        return self.url_of(name)

    def drop_database(self, url: str) -> None:
        """Drop the database at ``url``, ending the sessions that still use it."""
        name = url.rpartition("/")[2]
        self._administer(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def start(self) -> None:
        if not self._cluster.exists():
            self._make_cluster()
        super().start()

    @property
    def _cluster(self) -> Path:
        return self.directory / "cluster"

    def _make_cluster(self) -> None:
        user = self._user()
        if user is not None:
            shutil.chown(self.directory, user)
        command = [str(self._binaries / "initdb"), "-D", str(self._cluster), "-U", self.role, "--auth=trust", "--no-sync"]
        made = subprocess.run(
            [*command, "--encoding=UTF8", "--locale=C"],
            user=user, group=_group(user), extra_groups=[] if user else None,
            cwd=self.directory, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, f"initdb failed:\n{made.stdout}\n{made.stderr}"

    def _command(self) -> list[str]:
        options = {
            "listen_addresses": LOOPBACK, "port": str(self.port), "unix_socket_directories": "",
            "fsync": "on" if self._fsync else "off", "max_connections": "200", "shared_buffers": "64MB", "timezone": "UTC",
        }  # fmt: skip
        settings = itertools.chain.from_iterable(("-c", f"{key}={value}") for key, value in options.items())
        return [str(self._binaries / "postgres"), "-D", str(self._cluster), *settings]

    def _user(self) -> str | None:
        """PostgreSQL refuses to run as root; Debian's package brings an account for it."""
        if os.geteuid() != 0:
            return None
        try:
            return pwd.getpwnam("postgres").pw_name
        except KeyError:
            raise MissingServer("postgres (it refuses to run as root, and there is no account 'postgres')") from None

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self._conninfo, connect_timeout=5):
                return True
        except psycopg.OperationalError:
            return False

    def _administer(self, statement: sql.Composed) -> None:
        with psycopg.connect(self._conninfo, connect_timeout=5, autocommit=True) as connection:
            connection.execute(statement)

    @property
    def _conninfo(self) -> str:
        return f"host={LOOPBACK} port={self.port} user={self.role} dbname=postgres"


def spawn(command: list[str], *, log: Path, environment: Mapping[str, str], user: str | None = None) -> subprocess.Popen[bytes]:
    """Start a process in its own session that the kernel kills when we die; its output goes to ``log``."""
    setpriv = shutil.which("setpriv")  # part of util-linux; without it a killed test run may leave servers behind
    prefix = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    with log.open("ab") as output:
        return subprocess.Popen(
            [*prefix, *command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent, env=dict(environment),
            user=user, group=_group(user), extra_groups=[] if user else None, start_new_session=True,
        )  # fmt: skip


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a child of ours and all its descendants, and return when none is left."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended by itself, or with its parent
                member.kill()
        _, left = psutil.wait_procs(family[1:], timeout=10)
        assert not left, f"not killed: {left}"
    process.wait(timeout=10)


def _group(user: str | None) -> int | None:
    return None if user is None else pwd.getpwnam(user).pw_gid


def _find(program: str, *folders: Path) -> Path:
    """The path of ``program``: from the named folders first, then from PATH. Raises MissingServer."""
    for folder in folders:
        if (folder / program).is_file():
            return folder / program
    found = shutil.which(program)
    if found is None:
        raise MissingServer(program)
    return Path(found)


def _postgres_folders() -> list[Path]:
    """Where Debian puts PostgreSQL's programs, the newest version first."""
    versions = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    return sorted(versions, key=lambda path: int(path.parent.name), reverse=True)


def _ask(port: int, question: bytes) -> bytes:
    """The first bytes that a local server answers to ``question``; nothing when it refuses or stays silent for a second."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1) as connection:
            connection.sendall(question)
            return connection.recv(64)
    except OSError:
        return b""
