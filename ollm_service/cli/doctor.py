"""What is wrong here? One look at this machine's settings and at the service, with a remedy for each finding."""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import typer

from ollm_service import __version__
from ollm_service.cli.embedded import check_models
from ollm_service.cli.output import FAILED, AsJson, count, print_json, say
from ollm_service.client import Client
from ollm_service.core.errors import OllmError
from ollm_service.settings import MEMORY_BROKER, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `is_well` false makes the command fail; None only tells."""

    what: str
    is_well: bool | None
    told: str
    remedy: str | None = None


def doctor(as_json: AsJson = False) -> None:
    """Check this machine's set-up and the service. Exits 1 where something is wrong."""
    findings = [*_here(), *_service()]
    is_well = all(finding.is_well is not False for finding in findings)
    if as_json:
        print_json({"ok": is_well, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            mark = {True: "ok  ", False: "BAD ", None: "    "}[finding.is_well]
            say(f"{mark} {finding.what}: {finding.told}" + (f" {finding.remedy}" if finding.remedy else ""))
    if not is_well:
        raise typer.Exit(FAILED)


def _here() -> Iterator[Finding]:
    yield Finding(what="version", is_well=None, told=f"ollm_service {__version__}, Python {platform.python_version()}")
    missing = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
    if missing:
        yield Finding(
            what="worker",
            is_well=None,
            told=f"this machine cannot run one: {', '.join(missing)} is not installed.",
            remedy="pip install 'ollm-service[worker]' if it should.",
        )
    else:
        yield Finding(what="worker", is_well=True, told=f"torch {_version('torch')}, transformers {_version('transformers')}")
    try:
        settings = Settings.load()
        settings.labels  # noqa: B018 - raises where they are malformed
    except OllmError as error:
        yield Finding(what="settings", is_well=False, told=error.message, remedy=error.remedy)
        return
    broker = "none, workers poll" if settings.broker_url == MEMORY_BROKER else settings.broker_url.partition("://")[0]
    kind = settings.effective_database_url.partition(":")[0].partition("+")[0]
    yield Finding(what="settings", is_well=True, told=f"node {settings.effective_node}, database {kind}, broker {broker}")
    problem = check_models(settings.models_dir)
    yield Finding(
        what="models folder",
        is_well=None if problem else True,
        told=problem or str(settings.models_dir.absolute()),
        remedy="A worker here needs OLLM_MODELS_DIR or `up --models-dir`." if problem else None,
    )


def _service() -> Iterator[Finding]:
    try:
        with Client() as client:
            key = "with an API key" if os.environ.get("OLLM_API_KEY") else "without an API key"
            health = client.health()
            yield Finding(what="service", is_well=True, told=f"{client.base_url} answers; asked {key}")
            is_up = health.get("broker") != "down"
            yield Finding(
                what="broker",
                is_well=is_up,
                told=str(health.get("broker")),
                remedy=None if is_up else "Jobs still run, workers find them by polling; start the broker for quicker ones.",
            )
            workers = client.workers()
            active = [worker for worker in workers if worker.state == "active"]
            yield Finding(
                what="workers",
                is_well=bool(active),
                told=f"{count(len(active), 'worker')} active of {len(workers)}",
                remedy=None if active else "Start one with `ollm-service worker`.",
            )
            usable = [model for model in client.models() if model.raw.get("nodes") and not model.raw.get("unsafe_because")]
            yield Finding(
                what="models",
                is_well=bool(usable) if active else None,
                told=", ".join(model.id for model in usable) or "none",
                remedy=None if usable else "Put a model's folder into a worker's models folder.",
            )
    except OllmError as error:
        yield Finding(what="service", is_well=False, told=error.message, remedy=error.remedy)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
