"""Which verbs does `ollm-service` know? Each is a function of one of the modules beside this one."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ollm_service import __version__
from ollm_service.cli import amend, doctor, explain, fleet, jobs, models, plans, preview, service
from ollm_service.cli.output import exit_code, report, say
from ollm_service.core.errors import OllmError

HERE, JOBS, PLANS, FLEET = "Run the service", "Jobs", "Plans", "Fleet"
INTERRUPTED = 130

app = typer.Typer(
    name="ollm-service",
    help="Durable offline LLM jobs across mixed machines. Talks to OLLM_BASE_URL, or to the service on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, panel, verb in (
    ("up", HERE, service.up),
    ("serve", HERE, service.serve),
    ("worker", HERE, service.worker),
    ("doctor", HERE, doctor.doctor),
    ("submit", JOBS, jobs.submit),
    ("jobs", JOBS, jobs.list_jobs),
    ("job", JOBS, jobs.show_job),
    ("watch", JOBS, jobs.watch),
    ("results", JOBS, jobs.results),
    ("amend", JOBS, amend.amend),
    ("cancel", JOBS, jobs.cancel),
    ("retry", JOBS, jobs.retry),
    ("preview", PLANS, preview.preview),
    ("plans", PLANS, plans.list_plans),
    ("plan", PLANS, plans.show_plan),
    ("explain", PLANS, explain.explain),
    ("workers", FLEET, fleet.workers),
    ("drain", FLEET, fleet.drain),
):
    app.command(name, rich_help_panel=panel)(verb)
app.add_typer(models.models, name="models", rich_help_panel=FLEET)
app.add_typer(service.database, name="db", rich_help_panel=HERE)


def _tell_version(wanted: bool) -> None:
    if wanted:
        say(f"ollm-service {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 bad option or reference, 3 plan not executable, 1 anything else.

    `arguments` are the process's own unless given.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(args=words)
    except OllmError as error:
        report(error, as_json="--json" in words)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
