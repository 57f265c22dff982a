"""What would run where, how, and when would it be done? The quote of a job, in words that a person would use."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ollm_service.cli import previewed_files
from ollm_service.cli.input_rows import STDIN, read_rows
from ollm_service.cli.offline import preview_offline
from ollm_service.cli.options import Choices, takes_choices
from ollm_service.cli.output import NOT_EXECUTABLE, AsJson, bytes_in_words, count, print_facts, print_json, print_table, say
from ollm_service.client import Client, Preview
from ollm_service.core.errors import InvalidOption, printable

GIB = 1024**3
MINUTE, HOUR, DAY = 60, 3600, 86_400
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
        for verdict in found.workers:
            say(f"{verdict.node}: {'can run it' if verdict.eligible else 'cannot: ' + '; '.join(verdict.reasons)}")
    for problem in (found.raw.get("rows") or {}).get("invalid", ()):
        say(f"Row {problem['row']} ({printable(problem['custom_id'])}) would fail: {printable(problem['message'])}")
    if quote is not None and why:
        for worker in quote["workers"]:
            _show_bytes(worker)
    if quote is not None and found.id is not None:
        say(f"Nothing has run. To run exactly this:\n  ollm-service submit --plan {found.id}")


def _model_and_file(target: str | None, model: str | None, rows: str | None) -> tuple[str | None, str | None]:
    """What the argument means: a file if there is one of that name, or if a model is named besides."""
    if target is None or rows is not None:
        return model or target, rows
    is_file = target == STDIN or Path(target).is_file() or (model is not None and target != model)
    return (model, target) if is_file else (model or target, None)


def _machine(text: str) -> str | Mapping[str, Any]:
    """An imagined machine: a file that describes it, else a name that the service knows. Raises InvalidOption."""
    return previewed_files.read_machine(Path(text)) if text.endswith(".json") else text


def _show_plan(found: Preview) -> None:
    plan = found.runtime_plan
    print_facts(
        {
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
    say("")
    taking_part = sorted(quote["workers"], key=lambda worker: (-worker["share"], worker["name"]))
    print_table(("WORKER", "HOW", "BATCH", "MEMORY GiB", "ROWS/H", "SHARE"), _lines(taking_part))
    say("")
    _show_long_rows(quote, taking_part)
    _show_better(taking_part)


def _lines(workers: Iterable[Mapping[str, Any]]) -> Iterable[Sequence[object]]:
    for worker in workers:
        placement = worker["placement"]
        if placement is None:
            yield (worker["name"], f"not used: {'; '.join(worker['refused'])}", "", "", "", "")
            continue
        needed = sum(placement["estimate"][part] for part in ("weights", "kv", "activations", "logits", "workspace"))
        rate = f"{worker['rows_an_hour']:,.0f}" if worker["rate"] else "unknown"
        yield (
            worker["name"],
            f"{placement['tier']}, {worker['device']['device_id']}",
            placement["micro_batch"],
            f"{needed / GIB:.1f}/{worker['free_bytes'] / GIB:.1f}",
            rate,
            f"{worker['share']:.0%}",
        )


def _show_long_rows(quote: Mapping[str, Any], workers: Iterable[Mapping[str, Any]]) -> None:
    if quote["unplaceable_rows"]:
        say(f"{count(quote['unplaceable_rows'], 'row')} of up to {quote['longest_row_tokens']:,} tokens fit no worker.")
    able = [worker for worker in workers if worker["placement"] is not None]
    limited = [worker for worker in able if worker["left_out_rows"] > quote["unplaceable_rows"]]
    for worker in limited:
        most = worker["placement"]["longest_row_tokens"]
        say(f"{count(worker['left_out_rows'], 'row')} over {most:,} tokens do not fit {worker['name']}.")


def _show_better(workers: Iterable[Mapping[str, Any]]) -> None:
    """Each better way to run it that a worker has no room for, in one line."""
    for worker in workers:
        for tier in (worker["placement"] or {}).get("refused", ()):
            short = tier["needed_bytes"] - tier["free_bytes"]
            lacking = f"{bytes_in_words(short)} short" if short > 0 else tier["reason"]
            say(f"{worker['name']}: {tier['tier']} on {tier['device_id']}: {lacking}")


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
