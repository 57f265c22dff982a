"""Where is the service put together? The composition root: the only place that knows which parts a process is made of."""

import os
import time

from ollm_service.broker import Hints, make_celery
from ollm_service.coordinator.fleet import Fleet
from ollm_service.coordinator.service import Service
from ollm_service.core.ids import new_id
from ollm_service.core.precedence import OptionLayers
from ollm_service.settings import Settings
from ollm_service.store.database import open_database
from ollm_service.store.database import upgrade as upgrade_schema


def build(settings: Settings, options: OptionLayers) -> Service:
    """A coordinator's parts, connected to the database; the broker is dialled when the first hint is sent.

    Raises DatabaseUnavailable, and MisconfiguredService where a setting or the schema is wrong. Close it when done.
    """
    app = make_celery(settings.broker_url)
    store = open_database(settings.effective_database_url, lease_ms=round(settings.lease_seconds * 1000))
    return Service(settings=settings, store=store, hints=Hints(app), fleet=Fleet(store), make_id=make_id, options=options)


def upgrade(settings: Settings) -> None:
    """Bring the database's schema to this version. Raises DatabaseUnavailable and MisconfiguredService."""
    upgrade_schema(settings.effective_database_url)


def make_id(prefix: str) -> str:
    """A fresh id by this machine's clock."""
    return new_id(prefix, now_ms=time.time_ns() // 1_000_000, random_bytes=os.urandom(10))
