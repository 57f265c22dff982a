"""What does a coordinator hold while it runs? Made by `bootstrap`, used by the use cases, the loops and the API."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from ollm_service.broker import Hints
from ollm_service.coordinator.fleet import Fleet
from ollm_service.core.precedence import OptionLayers
from ollm_service.settings import Settings
from ollm_service.store.database import Store

DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One coordinator. `make_id` makes a fresh id with the given prefix; `stopping` is set when the process is asked to end.

    `options` is what this machine says of a job's options where the job says nothing.
    """

    settings: Settings
    store: Store
    hints: Hints
    fleet: Fleet
    make_id: Callable[[str], str]
    options: OptionLayers = field(default_factory=OptionLayers)
    stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the broker and the database."""
        self.stopping.set()
        self.hints.close()
        self.store.close()
