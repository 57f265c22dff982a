"""Which commands run the service itself: everything here, one coordinator, one worker, its database?"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ollm_service.cli.embedded import EmbeddedService, schema_command, server_command, worker_command
from ollm_service.cli.output import say
from ollm_service.configuration import read_options
from ollm_service.settings import Settings

database = typer.Typer(help="The database.", no_args_is_help=True)


def up(
    port: Annotated[int | None, typer.Option(help="Port to answer at; 0 takes a free one. Default: OLLM_PORT or 8000.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for the database, logs and caches. Default: ollm-data.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Folder whose subfolders are models. Default: models.")] = None,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Worker processes to run.")] = 1,
) -> None:
    """Run everything on this machine, in the foreground: server, workers and an embedded database."""
    settings = Settings.load(port=port, data_dir=data_dir, models_dir=models_dir)
    read_options(os.environ)  # the server will: better refused here than in its log
    raise typer.Exit(EmbeddedService(settings, workers=workers).run())


def serve() -> None:
    """Run one coordinator, set up by OLLM_* variables and ollm.toml."""
    Settings.load()
    read_options(os.environ)
    os.execv(sys.executable, server_command())


def worker() -> None:
    """Run one worker, set up by OLLM_* variables and ollm.toml; the same as `celery -A workers.app worker`."""
    Settings.load()
    os.execv(sys.executable, worker_command())


@database.command("upgrade")
def upgrade() -> None:
    """Make the database, or bring it to this version. Safe to run twice, and by two at once."""
    settings = Settings.load()
    done = subprocess.run(schema_command(), check=False)
    if done.returncode != 0:
        raise typer.Exit(done.returncode)
    kind = "SQLite" if settings.effective_database_url.startswith("sqlite") else "PostgreSQL"
    say(f"The {kind} database is up to date.")
