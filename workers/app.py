"""What is `celery -A workers.app worker`? The composition root of a worker: settings, store, agent and Celery's worker in one.

Celery looks for `app` in this module; it is made when it is asked for, so that importing does no work. A *worker* bootstep runs
the agent: a consumer's bootstep would stop whenever the broker goes.
"""

import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn

from celery import Celery, bootsteps, signals
from celery.worker import state

from ollm_service.broker import RUN_NEXT, make_celery
from ollm_service.core.errors import DatabaseUnavailable, OllmError
from ollm_service.core.ids import new_id
from ollm_service.inspection import DigestCache
from ollm_service.settings import MEMORY_BROKER, Settings
from ollm_service.store.database import Store, open_database
from workers.agent import Agent, Models, Terms
from workers.attempt import Patience
from workers.downloads import Downloader, can_download, download_environment
from workers.hints import SILENT_SECONDS, Hints
from workers.inventory import Inventory
from workers.lease import boot_clock
from workers.log_lines import set_up_logging
from workers.model_shelf import RESCAN_SECONDS, ModelShelf
from workers.probe import Claims, Probe
from workers.slots import Slot, Slots
from workers.supervisor import DEFAULT_COMMAND, RunnerProcess, Spawner

START_SECONDS = 5.0  # how long the database may take to answer at the start
DIGESTS = "digests.json"
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_log = logging.getLogger(__name__)


def __getattr__(name: str) -> Celery:
    if name == "app":
        return _app()
    raise AttributeError(name)


@cache
def _app() -> Celery:
    """This process's worker. Ends the process with a sentence where the settings are wrong."""
    try:
        return make_worker(Settings.load())
    except OllmError as error:
        _leave_with(2, error)


def make_worker(settings: Settings, *, silent_seconds: float = SILENT_SECONDS) -> Celery:
    """A Celery app whose worker runs an agent, and suspects a broker that is silent for so long. Raises MisconfiguredService."""
    app = make_celery(settings.broker_url)
    has_broker = settings.broker_url != MEMORY_BROKER
    app.conf.worker_concurrency = settings.slots
    app.conf.worker_consumer = f"workers.hints:{'HintConsumer' if has_broker else 'BrokerlessConsumer'}"
    worker = Worker(settings, Hints(app, silent_seconds=silent_seconds) if has_broker else None)
    app.steps["worker"].add(type("OllmAgent", (AgentStep,), {"worker": worker}))
    app.task(name=RUN_NEXT, ignore_result=True)(worker.run_next)
    signals.setup_logging.connect(_set_up_logging, weak=False)
    signals.celeryd_init.connect(worker.name_itself, weak=False)
    signals.worker_shutting_down.connect(worker.shutting_down, weak=False)
    return app


class Worker:
    """What lives as long as the worker's process: made at its start, from the settings."""

    def __init__(self, settings: Settings, hints: Hints | None) -> None:
        settings.labels  # noqa: B018 - malformed labels are refused now, with a sentence
        self._settings = settings
        self._hints = hints
        self._worker_id = new_id("wkr", now_ms=time.time_ns() // 1_000_000, random_bytes=os.urandom(10))
        self._agent: Agent | None = None
        self._store: Store | None = None
        self._is_shutting_down = False

    def run_next(self, class_id: str) -> int:
        """The Celery task: claim and run plans while there are any; returns how many."""
        return 0 if self._agent is None else self._agent.run_next(class_id)

    def start(self) -> None:
        """Open the database and begin. Raises OllmError."""
        self._store = self._open_database()
        self._agent = make_agent(self._settings, self._worker_id, self._store, hints=self._hints, on_end=_end_celery)
        self._agent.start()

    def attach(self, consumer: Any) -> None:
        """Celery's consumer is connected."""
        if self._hints is not None:
            self._hints.attach(consumer)

    def stop(self, *, at_once: bool) -> None:
        """Drain, or end at once, and return when everything is handed back."""
        if self._agent is not None:
            if at_once:
                self._agent.stop_now()
            else:
                self._agent.drain()
            self._agent.wait()
        if self._store is not None:
            self._store.close()

    def name_itself(self, instance: Any, **_: object) -> None:
        """In Celery's tools the worker bears its own id, so that several may share a host."""
        if instance.hostname.startswith("celery@"):
            instance.hostname = f"{self._worker_id}@{self._settings.effective_node}"

    def shutting_down(self, how: str, **_: object) -> None:
        """A signal came, in its handler: the first warm one drains; any other ends at once."""
        is_again, self._is_shutting_down = self._is_shutting_down, True
        if self._agent is None:
            return
        if how == "Warm" and not is_again:
            self._agent.drain()
        else:
            self._agent.stop_now()

    def _open_database(self) -> Store:
        """Open it; one that is just starting gets a few seconds. Raises OllmError."""
        settings, deadline = self._settings, time.monotonic() + START_SECONDS
        pause = threading.Event()
        while True:
            try:
                return open_database(settings.effective_database_url, lease_ms=int(settings.lease_seconds * 1000))
            except DatabaseUnavailable:
                if time.monotonic() >= deadline:
                    raise
                pause.wait(0.5)


class AgentStep(bootsteps.StartStopStep):
    """Runs the agent beside Celery's consumer, and outlives it at the end."""

    requires = ("celery.worker.components:Pool",)
    worker: Worker

    def create(self, _parent: Any) -> None:
        """Nothing is made before the worker starts."""

    def start(self, _parent: Any) -> None:
        """Begin; ends the process with a sentence where that cannot be."""
        try:
            self.worker.start()
        except OllmError as error:
            _leave_with(1, error)

    def stop(self, _parent: Any) -> None:
        """Celery consumes no more: finish."""
        self.worker.stop(at_once=False)

    def terminate(self, _parent: Any) -> None:
        """Celery ends at once."""
        self.worker.stop(at_once=True)

    def register_with_event_loop(self, parent: Any, _hub: object) -> None:
        """Called at every connection to the broker."""
        self.worker.attach(parent.consumer)


def make_agent(
    settings: Settings,
    worker_id: str,
    store: Store,
    *,
    hints: Hints | None = None,
    on_end: Callable[[int], None] | None = None,
    patience: Patience | None = None,
    rescan_seconds: float = RESCAN_SECONDS,
) -> Agent:
    """An agent by these settings, not yet started."""
    command = tuple(shlex.split(settings.runner_command)) or DEFAULT_COMMAND
    environment = _runner_environment(os.environ)
    claims = Claims(
        node=settings.effective_node,
        slots=settings.slots,
        labels=settings.labels,
        memory_limit_bytes=settings.memory_limit_bytes,
        has_own_runner=not settings.runner_command,
        may_download=settings.allow_downloads and can_download(settings.models_dir),
        downloadable=settings.downloadable,
    )
    spawner = Spawner()
    slots = Slots([Slot(number, RunnerProcess(spawner, command, environment=environment)) for number in range(settings.slots)])
    shelf = ModelShelf(settings.models_dir, DigestCache(settings.data_dir / DIGESTS), rescan_seconds=rescan_seconds)
    inventory = Inventory(Probe(claims, environment), shelf, slots, settings.effective_cache_dir)
    terms = Terms(
        models_dir=settings.models_dir,
        drain_seconds=settings.drain_seconds,
        patience=patience or Patience(stall=settings.stall_seconds),
    )
    downloader = Downloader(
        worker_id, store.downloads, shelf, settings.models_dir, download_environment(os.environ), clock=boot_clock
    )
    models = Models(shelf=shelf, downloader=downloader)
    return Agent(worker_id, store, inventory, models, slots, terms, hints=hints, on_end=on_end)


def _runner_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What runners see: no secrets of ours and none of the hub's, no hub, and GPUs numbered as the driver numbers them."""
    kept = {name: value for name, value in environment.items() if not name.startswith("OLLM_") and name not in HUB_TOKENS}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **kept}


def _end_celery(code: int) -> None:
    """Have Celery's main thread leave, with this exit code."""
    state.should_stop = code  # type: ignore[assignment]  # the stubs know its first value only


def _set_up_logging(loglevel: int, **_: object) -> None:
    set_up_logging(loglevel)


def _leave_with(code: int, error: OllmError) -> NoReturn:
    remedy = f" {error.remedy}" if error.remedy else ""
    sys.stderr.write(f"ollm-service worker: {error}{remedy}\n")
    raise SystemExit(code)
