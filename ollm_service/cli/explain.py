"""Which command says why rows wait? Where they are, what stands in their way, and what giving that up would bring."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from ollm_service.cli.output import AsJson, bytes_in_words, count, print_facts, print_json, reason_in_words, say
from ollm_service.cli.plans import print_plan
from ollm_service.cli.preview import duration
from ollm_service.client import Client, Plan
from ollm_service.core.errors import printable

Json = Mapping[str, Any]
MODEL_NOT_PRESENT = "model-not-present"
MOST_WORKERS = 20
MOST_ROWS = 10


def explain(
    target: Annotated[str, typer.Argument(metavar="JOB|PLAN", help="A job's or a plan's id.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Say why rows wait: what each worker lacks, what cannot all hold, and what giving it up would bring."""
    with Client() as client:
        plan = client.plan(target) if target.startswith("plan_") else None
        found = client.explain(target) if plan is None else plan.raw
    if as_json:
        print_json(found)
    elif plan is None:
        _explain_job(found)
    else:
        _explain_plan(plan)


def _explain_job(found: Json) -> None:
    say(_where_rows_are(found))
    for group in found["groups"]:
        if len(found["groups"]) > 1:
            say(f"\n{count(group['rows_left'], 'row')} in {count(group['plans_total'], 'plan')} ({group['plan_id']}):")
        _explain_waiting(group)


def _explain_plan(plan: Plan) -> None:
    found = plan.raw
    say(f"{plan.id} is {plan.state}.")
    print_plan(plan.runtime_plan, None)
    print_facts({"last step": found.get("reason")})
    if found["stuck_rows"]:
        say(f"{found['stuck_rows']:,} of its {count(found['row_count'] - found['rows_done'], 'row')} fit no connected worker.")
    _explain_waiting(found)


def _where_rows_are(found: Json) -> str:
    total, stuck = found["row_count"], found["stuck"]
    rest = {
        "have a result": found["answered"],
        "are running": found["running"],
        "wait for their turn": found["waiting"] - stuck,
    }
    places = {what: number for what, number in rest.items() if number}
    if not stuck:
        fits = "; every row that waits fits a connected worker" if found["waiting"] else ""
        return f"Of {count(total, 'row')} {_listed(places)}{fits}."
    told = (
        f"{stuck:,} of {count(total, 'row')} fit no connected worker." if stuck < total else "No connected worker fits any row."
    )
    if len(places) == 1:
        return f"{told} The rest {next(iter(places))}."
    return f"{told} Of the rest {_listed(places)}." if places else told


def _listed(places: Mapping[str, int]) -> str:
    parts = [f"{number:,} {what}" for what, number in places.items()]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else "none is left"


def _explain_waiting(found: Json) -> None:
    print_facts({"waits for": found["condition"]})
    if found["conflicts"] is not None:
        _show_ways(found)
    is_absent = found["condition"] == MODEL_NOT_PRESENT
    lines = [(worker["node"], _standing(worker, is_absent=is_absent)) for worker in found["workers"][:MOST_WORKERS]]
    if len(found["workers"]) > MOST_WORKERS:
        lines.append(("…", f"and {count(len(found['workers']) - MOST_WORKERS, 'worker')} more; see them with --json"))
    lines += [(worker["node"], _offline(worker)) for worker in found["offline"][:MOST_WORKERS]]
    _print_aligned(lines)


def _show_ways(found: Json) -> None:
    ways = found["conflicts"]["ways"]
    if not ways:
        is_empty = not found["workers"]
        say(
            "No worker is connected."
            if is_empty
            else "Nothing that was asked for stands in the way: the model needs more than these workers have."
        )
    elif found["conflicts"]["joint"]:
        say("These cannot all hold, and no single one is enough. Give up all of them together:")
        (way,) = ways
        _print_aligned([(f" - {demand['words']}", "") for demand in way["give_up"]])
        say(f"   → {_brings(way)}")
        say(f"   {way['command'] or _without_command(way)}")
    else:
        say("These cannot all hold. Give up any one:" if len(ways) > 1 else "This cannot hold:")
        _print_aligned(
            [
                (f"{number:2} {way['give_up'][0]['words']}", f"→ {_brings(way)}", way["command"] or _without_command(way))
                for number, way in enumerate(ways, start=1)
            ]
        )


def _brings(way: Json) -> str:
    """The worker, how it would run, and how long."""
    if way["skipped_rows"] and len(way["give_up"]) == 1:
        return f"skip {_rows(way['skipped_rows'])}"
    placement = way["placement"]
    how = f"{placement['tier']}, {count(placement['micro_batch'], 'row')} at a time" if placement else "how is not known yet"
    time = f", about {duration(way['seconds'])}" if way["seconds"] is not None else ""
    return f"{way['node']}, {how}{time}"


def _without_command(way: Json) -> str:
    if any(demand["kind"] == "model" for demand in way["give_up"]):
        return f"put it into {way['node']}'s models folder"
    return "submit them apart from the others"


def _rows(rows: Sequence[int]) -> str:
    named = ", ".join(str(row) for row in rows[:MOST_ROWS])
    more = f" and {len(rows) - MOST_ROWS:,} more" if len(rows) > MOST_ROWS else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {named}{more}"


def _standing(worker: Json, *, is_absent: bool) -> str:
    """What a connected worker says; `is_absent` where nobody has the model."""
    if worker["reasons"]:
        return f"cannot: {reason_in_words('; '.join(worker['reasons']))}"
    placement = worker["placement"]
    if placement is not None:
        return f"fits: {placement['tier']} on {placement['device_id']}, {count(placement['micro_batch'], 'row')} at a time"
    if not worker["refused"]:
        return "may fetch the model; whether it has room is known then" if is_absent else "can take it"
    return f"{_shortage(worker)}{', but has room once its memory is free' if worker['fits_when_free'] else ''}"


def _offline(worker: Json) -> str:
    """What a worker that is not connected would say."""
    seen = datetime.fromisoformat(worker["seen_at"]).astimezone()
    is_recent = datetime.now(seen.tzinfo) - seen < timedelta(hours=20)
    since = f"offline since {seen.strftime('%H:%M' if is_recent else '%d %B, %H:%M')}"
    if worker["state"] == "draining":
        since = "finishes what it has, then leaves"
    if worker["reasons"]:
        return f"{since}; cannot: {reason_in_words('; '.join(worker['reasons']))}"
    if worker["fits_when_free"] or not worker["refused"]:
        return f"{since}; fits; its plans start by themselves when it returns"
    return f"{since}; {_shortage(worker)}"


def _shortage(worker: Json) -> str:
    """Of the ways to run it, the one that lacks least, part by part."""
    short = [tier for tier in worker["refused"] if tier["short_of"]]
    if not short:
        return f"cannot: {'; '.join(dict.fromkeys(tier['reason'] for tier in worker['refused']))}"
    tier = min(short, key=lambda refused: refused["needed_bytes"] - refused["free_bytes"])
    needed, usable = bytes_in_words(tier["needed_bytes"]), bytes_in_words(tier["free_bytes"])
    if tier["short_of"] != "memory":
        return f"needs {needed} of {tier['short_of']} ({tier['tier']}); {usable} usable"
    return f"needs {needed} on {tier['device_id']} ({tier['tier']}: {_parts(tier['estimate'])}); {usable} usable"


def _parts(estimate: Json) -> str:
    """What the memory of a device is needed for, in three figures."""
    work = sum(estimate[part] for part in ("activations", "logits", "masks", "workspace"))
    figures = {"KV": estimate["kv"], "weights": estimate["weights"], "work": work}
    return ", ".join(f"{name} {bytes_in_words(size)}" for name, size in figures.items())


def _print_aligned(lines: Iterable[Sequence[str]]) -> None:
    """Columns below each other, without a header."""
    shown = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for line in shown:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
