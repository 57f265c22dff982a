"""Which commands work on jobs? Submit, list, follow, read, cancel and retry them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ollm_service.cli import previewed_files
from ollm_service.cli.input_rows import read_rows
from ollm_service.cli.models import in_words
from ollm_service.cli.options import Choices, seconds_in, takes_choices
from ollm_service.cli.output import (
    FAILED,
    AsJson,
    count,
    print_facts,
    print_json,
    print_json_lines,
    print_table,
    say,
    tell,
)
from ollm_service.cli.preview import duration, quoted_in_words
from ollm_service.cli.progress import shown
from ollm_service.cli.result_file import ResultFile, check_writable
from ollm_service.client import Client, Job, Result
from ollm_service.core.errors import InvalidOption, printable
from ollm_service.core.lifecycle import JobState

MOST_ERRORS = 3

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, job_…", show_default=False)]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Write the results to this file, in row order.")
]


@takes_choices()
def submit(
    choices: Choices,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE", help="JSONL of ours or of OpenAI's batches, CSV, or - for standard input.", show_default=False
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Alias, hub id or name of a model on the fleet.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of a CSV file that holds the prompts.")] = None,
    plan: Annotated[
        str | None, typer.Option(metavar="PREVIEW", help="Run exactly what this preview, pl_…, showed, or hear what has changed.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job and print its results.")] = False,
    output: Output = None,
    where: Annotated[str | None, typer.Option(help='Labels that a worker must have, such as zone == "home".')] = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs earlier.")] = None,
    deadline: Annotated[str | None, typer.Option(help="Give up what is not answered by then: 90s, 15m, 2h, 1d.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Submitting again with the same key returns the first job.")] = None,
    as_json: AsJson = False,
) -> None:
    """Submit the rows of a file as one job; with --wait or -o, follow it to its end."""
    deadline_seconds = seconds_in(deadline)
    if output is not None:
        check_writable(output)
    if file is None:
        if plan is None:
            raise InvalidOption("FILE", "say which file holds the rows, or - for standard input")
        file, prompt_column = previewed_files.recall(plan)
    read = read_rows(file, model=model, prompt_column=prompt_column)
    with Client() as client:
        if plan is not None:
            _refuse_choices(choices, model=model, where=where)
            job = client.submit_previewed(
                plan, read.rows, priority=priority, deadline_seconds=deadline_seconds, idempotency_key=idempotency_key
            )
        elif read.model is None:
            raise InvalidOption("--model", "say which model is to answer, such as -m llama3-1B-chat")
        else:
            job = client.submit(
                read.model,
                read.rows,
                runtime=choices.runtime,
                generation=choices.generation,
                priority=priority,
                where=where,
                deadline_seconds=deadline_seconds,
                idempotency_key=idempotency_key,
            )
        if wait or output is not None:
            _announce(job, quiet=as_json)
            follow(client, job, output, as_json=as_json)
        elif as_json:
            print_json(job.status.raw)
        else:
            say(job.id)
            _announce(job, quiet=False)
            if job.counts.failed:
                tell(f"{count(job.counts.failed, 'row')} of them cannot run; `ollm-service results {job.id} --failed` says why.")
            tell(f"Follow it with `ollm-service watch {job.id}`.")


def _refuse_choices(choices: Choices, *, model: str | None, where: str | None) -> None:
    """A preview has settled them. Raises InvalidOption."""
    if choices.runtime or choices.generation or model or where:
        raise InvalidOption("--plan", "stands for the model and every option; make another preview to change them")


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, help="Show the newest so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the newest jobs."""
    with Client() as client:
        newest = [job for job, _ in zip(client.jobs(), range(limit), strict=False)]
    if as_json:
        print_json_lines(job.status.raw for job in newest)
        return
    print_table(
        ("JOB", "MODEL", "STATE", "ROWS", "DONE", "FAILED", "CREATED"),
        [
            (job.id, job.model, job.state, job.row_count, job.counts.done, job.counts.failed, job.status.raw.get("created_at"))
            for job in newest
        ],
    )


def show_job(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job."""
    with Client() as client:
        job = client.job(job_id)
    if as_json:
        print_json(job.status.raw)
        return
    raw = job.status.raw
    usage = raw.get("usage") or {}
    first = job.plans[0] if job.plans else None
    print_facts(
        {
            "job": job.id,
            "model": job.model,
            "state": job.state,
            "rows": f"{job.counts.succeeded:,} answered, {job.counts.failed:,} failed, {job.counts.pending:,} to do",
            "tokens": f"{usage.get('prompt_tokens', 0):,} read, {usage.get('completion_tokens', 0):,} written",
            "plans": job.plans_total,
            "waits for": ", ".join(sorted({plan.condition for plan in job.plans if plan.condition})),
            "downloads": "; ".join(in_words(download) for download in raw.get("downloads") or ()),
            "why so": first.reason if first else None,
            "retry of": raw.get("retry_of"),
            "quoted": quoted_in_words(raw.get("quoted")),
            "took": _took(raw),
            "created": raw.get("created_at"),
            "finished": raw.get("finished_at"),
        }
    )


def _took(raw: Mapping[str, Any]) -> str | None:
    """From its submission to its end."""
    created, finished = raw.get("created_at"), raw.get("finished_at")
    if not created or not finished:
        return None
    return duration((datetime.fromisoformat(finished) - datetime.fromisoformat(created)).total_seconds())


def watch(job_id: JobId, as_json: AsJson = False) -> None:
    """Follow a job to its end. Exits 1 unless every row was answered."""
    with Client() as client:
        job = client.job(job_id)
        with shown(client, job.id, quiet=as_json):
            job.wait()
        _conclude(job, Counter(), as_json=as_json)


def results(
    job_id: JobId,
    output: Output = None,
    follow_on: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Only the rows that failed.")] = False,
    as_json: AsJson = False,  # noqa: ARG001 - results are JSON lines with it and without it
) -> None:
    """Print a job's results as JSON lines, or write them to a file; those that are there, or all with --follow."""
    with Client() as client:
        job = client.job(job_id)
        if output is None:
            found = job.results(follow=follow_on)
            _print_results(result for result in found if result.error is not None or not failed)
            return
        if failed:
            raise InvalidOption("--failed", "cannot be combined with --output")
        if not follow_on and not job.is_final:
            raise InvalidOption("--output", f"{job.id} is still {job.state}; add --follow to wait for its end")
        check_writable(output)
        follow(client, job, output, as_json=False)


def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job. Rows that are answered stay answered."""
    with Client() as client:
        job = client.job(job_id).cancel()
    if as_json:
        print_json(job.status.raw)
    elif job.state is JobState.CANCELLED:
        say(f"{job.id} is cancelled; {count(job.counts.succeeded, 'row')} had been answered.")
    elif job.is_final:
        say(f"{job.id} had ended before: {job.state}.")
    else:
        say(f"{job.id} is being stopped; its workers hear of it within seconds.")


def retry(
    job_id: JobId,
    failed: Annotated[bool, typer.Option("--failed", help="Only the rows that failed; so far there is no other choice.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the new job and print its results.")] = False,
    output: Output = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Retrying again with the same key returns the same job.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a new job of the rows of a job that failed."""
    if not failed:
        tell("Only the rows that failed are tried again.")
    if output is not None:
        check_writable(output)
    with Client() as client:
        job = client.retry(job_id, idempotency_key=idempotency_key)
        if wait or output is not None:
            _announce(job, quiet=as_json)
            follow(client, job, output, as_json=as_json)
        elif as_json:
            print_json(job.status.raw)
        else:
            say(job.id)
            tell(f"It has the {count(job.row_count, 'row')} of {job_id} that failed.")


def follow(client: Client, job: Job, output: Path | None, *, as_json: bool) -> None:
    """Take a job's results as they come, to a file or to standard output. Exits 1 unless every row was answered."""
    errors: Counter[str] = Counter()
    with shown(client, job.id, quiet=as_json):
        if output is None:
            _print_results(_counting(job.results(), errors))
        else:
            collected = ResultFile.open(output, job.id)
            try:
                for result in _counting(job.results(after=collected.cursor), errors):
                    collected.append(result)
                collected.finish()
            finally:
                collected.close()
    job.refresh()
    if output is not None and not as_json:
        tell(f"{output} has the {count(job.counts.done, 'result')}.")
    _conclude(job, errors, as_json=as_json and output is not None)


def _counting(results: Iterable[Result], errors: Counter[str]) -> Iterator[Result]:
    """The same results, while their errors are counted by what they say."""
    for result in results:
        if result.error is not None:
            errors[f"{result.error.code}: {result.error.message}"] += 1
        yield result


def _print_results(results: Iterable[Result]) -> None:
    print_json_lines(result.raw for result in results)


def _announce(job: Job, *, quiet: bool) -> None:
    if quiet:
        return
    plans = "" if job.plans_total == 1 else f" in {count(job.plans_total, 'plan')}"
    tell(f"{job.id}: {count(job.row_count, 'row')} for {job.model}{plans}.")
    for plan in job.plans[:1]:
        tell(f"How it will run: {plan.reason}")
        if plan.condition:
            tell(f"It waits: {plan.condition} (`ollm-service explain {plan.id}` says why).")


def _conclude(job: Job, errors: Counter[str], *, as_json: bool) -> None:
    """Say how it ended, and exit 1 unless every row was answered."""
    if as_json:
        print_json(job.status.raw)
    if job.state is JobState.SUCCEEDED and not job.counts.failed:
        return
    if not as_json:
        for error, rows in errors.most_common(MOST_ERRORS):
            tell(f"{count(rows, 'row')} failed with {printable(error)}")
        tell(
            f"{job.id} is {job.state}: {count(job.counts.failed, 'row')} failed. See them with "
            f"`ollm-service results {job.id} --failed`, try them again with `ollm-service retry {job.id} --failed`."
        )
    raise typer.Exit(FAILED)
