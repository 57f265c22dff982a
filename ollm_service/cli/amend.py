"""Which command changes how a job runs while it waits?"""

import re
from typing import Annotated

import typer

from ollm_service.cli.jobs import JobId
from ollm_service.cli.options import Choices, takes_choices
from ollm_service.cli.output import AsJson, count, print_json, say, tell
from ollm_service.client import Client
from ollm_service.core.errors import InvalidOption, shown


@takes_choices(generation=False)
def amend(
    choices: Choices,
    job_id: JobId,
    where: Annotated[str | None, typer.Option(metavar="EXPR|any", help="Labels that a worker must have; `any` for none.")] = None,
    skip_rows: Annotated[str | None, typer.Option(metavar="N,M,…", help="Give these rows up.")] = None,
    as_json: AsJson = False,
) -> None:
    """Change how a job's plans run that nobody has begun. An option set to `any` is not demanded any more."""
    rows = _numbers(skip_rows)
    with Client() as client:
        job = client.job(job_id)
        done = job.amend(choices.runtime, where=where, skip_rows=rows)
    if as_json:
        print_json(job.status.raw)
        return
    if choices.runtime or where:
        kept = f"; {done.plans_kept:,} that had begun stay as they are" if done.plans_kept else ""
        say(f"{job.id}: {count(done.plans_amended, 'plan')} changed{kept}.")
    if rows:
        say(f"{job.id}: {count(done.rows_skipped, 'row')} skipped.")
    waiting = sorted({plan.condition for plan in job.plans if plan.condition})
    if waiting:
        tell(f"It still waits: {', '.join(waiting)} (`ollm-service explain {job.id}` says why).")


def _numbers(text: str | None) -> list[int]:
    """The rows of `211,9034`. Raises InvalidOption."""
    parts = [] if text is None else [part for part in re.split(r"[,\s]+", text.strip()) if part]
    if not all(re.fullmatch(r"\d{1,9}", part, re.ASCII) for part in parts):
        raise InvalidOption("--skip-rows", f"`{shown(text)}` is not a list of row numbers, such as 211,9034")
    return [int(part) for part in parts]
