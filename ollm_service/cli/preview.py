"""What would run where, how, and when would it be done? The quote of a job, in words that a person would use."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from ollm_service.cli import previewed_files
from ollm_service.cli.input_rows import STDIN, read_rows
from ollm_service.cli.offline import preview_offline
from ollm_service.cli.options import Choices, takes_choices
from ollm_service.cli.output import (
    NOT_EXECUTABLE,
    AsJson,
    bytes_in_words,
    count,
    print_facts,
    print_json,
    print_table,
    reason_in_words,
    say,
)
from ollm_service.client import Client, Preview
from ollm_service.core.errors import InvalidOption, printable
from ollm_service.core.estimates import MemoryEstimate
from ollm_service.core.quote import NOTICEABLE_PART, NOTICEABLE_SECONDS
from ollm_service.core.wire import from_json

GIB = 1024**3
MINUTE, HOUR, DAY = 60, 3600, 86_400
MOST_NAMED = 5
SELECTOR = "strategy_selector_"


@takes_choices()
def preview(
    choices: Choices,
    target: Annotated[
        str | None,
        typer.Argument(metavar="FILE|MODEL", help="A file of rows, as `submit` takes it, or a model.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Alias, hub id or name of a model on the fleet.")] = None,
    rows: Annotated[str | None, typer.Option(metavar="FILE", help="The file, where the argument is a model.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of a CSV file that holds the prompts.")] = None,
    where: Annotated[str | None, typer.Option(help='Labels that a worker must have, such as zone == "home".')] = None,
    imagined: Annotated[
        list[str] | None, typer.Option("--if", metavar="NAME|FILE.json", help="Quote as if this machine were there, too.")
    ] = None,
    models_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Plan for a worker with this models folder; needs no service.")
    ] = None,
    why: Annotated[bool, typer.Option("--why", help="Show every byte, pass and refusal.")] = False,
    as_json: AsJson = False,
) -> None:
    """See what would run where, how, and when it would be done. Nothing runs; exits 3 when nothing could run it."""
    name, file = _model_and_file(target, model, rows)
    read = None if file is None else read_rows(file, model=name, prompt_column=prompt_column)
    wanted = name or (read.model if read else None)
    if wanted is None:
        raise InvalidOption("MODEL", "say which model, such as `ollm-service preview rows.jsonl -m llama3-1B-chat`")
    if models_dir is not None:
        if read is not None or imagined:
            raise InvalidOption("--models-dir", "plans without a service, which alone quotes rows; leave out FILE and --if")
        found = preview_offline(models_dir, wanted, choices, where=where)
    elif imagined and read is None:
        raise InvalidOption("--if", "imagines a machine for a quote, which is made of rows; name a FILE")
    else:
        with Client() as client:
            found = client.preview(
                wanted,
                choices.runtime,
                choices.generation,
                where=where,
                rows=None if read is None else read.rows,
                if_workers=[_machine(text) for text in imagined or ()],
            )
    if found.id is not None and file not in (None, STDIN):
        previewed_files.remember(found.id, str(file), prompt_column)
    if as_json:
        print_json(found.raw)
    else:
        show(found, why=why)
    if not found.runtime_plan.is_executable():
        raise typer.Exit(NOT_EXECUTABLE)


def show(found: Preview, *, why: bool) -> None:
    """Say it to a person."""
    quote = found.raw.get("quote")
    if quote is None or why:
        _show_plan(found)
    if quote is not None:
        _show_quote(found, quote)
    else:
        if found.raw.get("rows") is not None and found.id is not None:
            rows = count(found.raw["rows"]["row_count"], "row")
            say(f"{rows}, without a quote: what the model needs is not known until a worker has it.")
        for verdict in found.workers:
            say(f"{verdict.node}: {'can run it' if verdict.eligible else 'cannot: ' + '; '.join(verdict.reasons)}")
    for problem in (found.raw.get("rows") or {}).get("invalid", ()):
        say(f"Row {problem['row']} ({printable(problem['custom_id'])}) would fail: {printable(problem['message'])}")
    if quote is not None and why:
        for worker in quote["workers"]:
            _show_bytes(worker)
    if found.raw.get("rows") is not None and found.id is not None:
        say(f"Nothing has run. To run exactly this:\n  ollm-service submit --plan {found.id}")


def _model_and_file(target: str | None, model: str | None, rows: str | None) -> tuple[str | None, str | None]:
    """What the argument means: a file if there is one of that name, or if a model is named besides."""
    if target is None or rows is not None:
        return model or target, rows
    is_file = target == STDIN or _is_file(target) or (model is not None and target != model)
    return (model, target) if is_file else (model or target, None)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:
        return False  # longer than any file's name


def _machine(text: str) -> str | Mapping[str, Any]:
    """An imagined machine: a file that describes it, else a name that the service knows. Raises InvalidOption."""
    return previewed_files.read_machine(Path(text)) if text.endswith(".json") else text


def _show_plan(found: Preview) -> None:
    plan = found.runtime_plan
    print_facts(
        {
            "model": found.raw["resolved_model"]["resolution_message"],
            "runs on": plan.backend_id or "nothing",
            "why": plan.reason,
            "passes": ", ".join(plan.specialization_pass_ids),
            "waits for": found.condition,
        }
    )


def _show_quote(found: Preview, quote: Mapping[str, Any]) -> None:
    needs = found.requirements or {}
    facts = [
        count(quote["row_count"], "row"),
        f"about {_tokens(quote['prompt_tokens'])} tokens in, at most {_tokens(quote['most_output_tokens'])} out",
        ", ".join(filter(None, (needs.get("dtype"), bytes_in_words(needs.get("memory_bytes"))))),
    ]
    say(" · ".join(fact for fact in facts if fact))
    say(_when(quote))
    _show_ahead(quote)
    say("")
    taking_part = sorted(quote["workers"], key=lambda worker: (-worker["share"], worker["name"]))
    is_long = quote["seconds"] is not None and quote["seconds"] >= NOTICEABLE_SECONDS
    lines = [line for worker in taking_part for line in _lines(worker, quote["seconds"] if is_long else None)]
    print_table(("WORKER", "HOW", "BATCH", "MEMORY GiB", "ROWS/H", "SHARE"), lines)
    say("")
    _show_long_rows(quote, taking_part)
    _show_leave_out(quote)


def _show_ahead(quote: Mapping[str, Any]) -> None:
    """What of other jobs comes first, and when this one begins."""
    if quote["plans_ahead"]:
        begins = min((at for worker in quote["workers"] if (at := worker["begins_seconds"]) is not None), default=None)
        when = (
            ""
            if begins is None
            else f"; this one begins in about {duration(begins)}"
            if begins >= 1
            else "; this one begins at once"
        )
        say(f"{_plans(quote['plans_ahead'])} first{when}.")
    if quote["plans_not_counted"]:
        say(f"{_plans(quote['plans_not_counted'])} first and are not counted: how long that takes is not known.")


def _plans(number: int) -> str:
    return f"{count(number, 'plan')} of other jobs {'comes' if number == 1 else 'come'}"


def _lines(worker: Mapping[str, Any], job_seconds: float | None) -> Iterable[Sequence[object]]:
    """A worker's line, and below it what would be better and has no room, and whether it is of any use to a long job."""
    placement = worker["placement"]
    if placement is None:
        yield (worker["name"], f"not used: {reason_in_words('; '.join(worker['refused']))}", *[""] * 4)
        return
    yield (
        worker["name"],
        _how(placement),
        placement["micro_batch"],
        f"{_needed(placement['estimate']) / GIB:.1f}/{worker['free_bytes'] / GIB:.1f}",
        f"{worker['rows_an_hour']:,.0f}" if worker["rate"] else "unknown",
        f"{worker['share']:.0%}",
    )
    for tier in placement["refused"]:
        if tier["short_of"] is not None:
            what = "" if tier["short_of"] == "memory" else f" of {tier['short_of']}"
            short = bytes_in_words(tier["needed_bytes"] - tier["free_bytes"])
            yield ("", f"{tier['tier']} on {tier['device_id']}: {short}{what} short", *[""] * 4)
    saves = worker["saves_seconds"]
    if job_seconds is not None and saves is not None and saves < min(NOTICEABLE_SECONDS, NOTICEABLE_PART * job_seconds):
        yield ("", f"saves under {duration(NOTICEABLE_SECONDS)}" if saves > 0 else "saves no time", *[""] * 4)


def _how(placement: Mapping[str, Any]) -> str:
    """`all on device, cpu`, or where the layers are: `4 layers on cuda:0, 28 from RAM`."""
    moved = {"RAM": placement["layers_in_host"], "disk": placement["layers_on_disk"]}
    if not any(moved.values()):
        return f"{placement['tier']}, {placement['device_id']}"
    there = f"{count(placement['layers_on_device'], 'layer')} on {placement['device_id']}"
    parts = [there, *(f"{layers} from {place}" for place, layers in moved.items() if layers)]
    parts += ["vocabulary from disk"] if placement.get("vocabulary_on_disk") else []
    return ", ".join(parts) + ("; KV cache in files" if placement["estimate"]["disk"] else "")


def _needed(estimate: Mapping[str, Any]) -> int:
    """What has to be free on the device."""
    return from_json(MemoryEstimate, estimate).device_bytes


def _show_long_rows(quote: Mapping[str, Any], workers: Iterable[Mapping[str, Any]]) -> None:
    """Which rows fit only some workers, by the longest row that each of them holds."""
    able = [worker for worker in workers if worker["placement"] is not None]
    # What is left out of a worker's rows is left out by all that hold no longer ones.
    limits = sorted({(worker["longest_row_tokens"], worker["left_out_rows"]) for worker in able if worker["left_out_rows"]})
    for (limit, left_out), (further, fewer) in pairwise([*limits, (None, 0)]):
        names = sorted({worker["name"] for worker in able if _holds_more(worker, limit)})
        if names and left_out > fewer:
            size = f"over {limit:,}" if further is None else f"of {limit + 1:,} to {further:,}"
            run = "runs" if left_out - fewer == 1 else "run"
            say(f"{count(left_out - fewer, 'row')} {size} tokens {run} on {_and(names)} only.")
    if quote["unplaceable_rows"]:
        say(f"{count(quote['unplaceable_rows'], 'row')} of up to {quote['longest_row_tokens']:,} tokens fit no worker.")


def _holds_more(worker: Mapping[str, Any], tokens: int) -> bool:
    return worker["longest_row_tokens"] is None or worker["longest_row_tokens"] > tokens


def _and(names: Sequence[str]) -> str:
    """`desktop`, `desktop and h200`, `a, b and c`, or how many there are."""
    if len(names) > MOST_NAMED:
        return f"{len(names)} workers"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _show_leave_out(quote: Mapping[str, Any]) -> None:
    """Who holds up the end, and what leaves him out; and what the labels cost."""
    anywhere = quote["seconds_anywhere"]
    if anywhere is not None:
        say(f"On workers with other labels, too, it would be done in about {duration(anywhere)}: leave --where out")
    advice = quote["leave_out"]
    if advice is not None:
        names, option = _and(advice["nodes"]), f"--where {shlex.quote(advice['where'])}"
        say(f"Without {names} it would be done in about {duration(advice['seconds'])}: {option}")


def _show_bytes(worker: Mapping[str, Any]) -> None:
    placement, rate = worker["placement"], worker["rate"]
    if placement is None:
        return
    say(f"{worker['name']} in detail:")
    facts: dict[str, object] = {name: bytes_in_words(size) for name, size in placement["estimate"].items()}
    if rate:
        source = f"measured over {count(rate['attempts'], 'attempt')}" if rate["attempts"] else "from the device's probed speed"
        facts["prefill"] = f"{rate['prefill']:,.0f} tokens/s, {source}"
        facts["one token each"] = f"{rate['pass_seconds'] * 1000:,.1f} ms for {rate['rows']:,.0f} rows"
        facts["loading"] = duration(rate["load_seconds"])
    facts |= {f"not {tier['tier']}": tier["reason"] for tier in placement["refused"]}
    facts |= {f"KV: {name.removeprefix(SELECTOR).replace('_', ' ')}": how for name, how in placement["kv_details"].items()}
    print_facts({f"  {name}": value for name, value in facts.items()})


def _when(quote: Mapping[str, Any]) -> str:
    if not quote["row_count"]:
        return "No row can be run."
    if quote["seconds"] is None:
        able = any(worker["placement"] for worker in quote["workers"])
        return "When it would be done is not known: no worker's speed is." if able else "No worker can run it now."
    return f"Done in about {quoted_in_words(quote)}"


def quoted_in_words(quoted: Mapping[str, Any] | None) -> str | None:
    """`11 s (8 s to 13 s; as measured here)`; None for what has no time."""
    if quoted is None or quoted["seconds"] is None:
        return None
    measured = "as measured here" if quoted["is_measured"] else "never measured here"
    span = f"{duration(quoted['fastest_seconds'])} to {duration(quoted['slowest_seconds'])}"
    return f"{duration(quoted['seconds'])} ({span}; {measured})"


def duration(seconds: float) -> str:
    """`4 s`, `12 min`, `10 h 40`, `3 days 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    minutes = round(seconds / MINUTE)
    if minutes < 90:
        return f"{minutes} min"
    if seconds < 2 * DAY:
        return f"{minutes // 60} h {minutes % 60:02}"
    hours = round(seconds / HOUR)
    return f"{hours // 24} days {hours % 24} h"


def _tokens(number: int) -> str:
    """`870`, `12.5 k`, `60.0 M`."""
    if number < 10_000:
        return f"{number:,}"
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number / 1e3:,.1f} k"
