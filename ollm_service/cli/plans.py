"""Which commands show plans: before they run, while they wait, and what became of them?"""

import itertools
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated

import typer

from ollm_service.cli.output import (
    AsJson,
    bytes_in_words,
    print_facts,
    print_json,
    print_json_lines,
    print_table,
    say,
)
from ollm_service.client import Attempt, Client, Plan
from ollm_service.core.estimates import MemoryEstimate
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.plan import RuntimePlan
from ollm_service.core.wire import from_json

NEWEST = 20

PlanId = Annotated[str, typer.Argument(metavar="PLAN", help="The plan's id, plan_…", show_default=False)]


def list_plans(
    job_id: Annotated[str | None, typer.Argument(metavar="JOB", help="The job's id, job_…", show_default=False)] = None,
    state: Annotated[ExecutionState | None, typer.Option(help="Only those in this state.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"Show so many; unless given, all of a job's, or the newest {NEWEST} of all jobs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List a job's plans, or the newest of all jobs."""
    most = limit or (NEWEST if job_id is None else None)
    with Client() as client:
        found = itertools.islice(client.plans(job_id, state=state), most)
        if as_json:
            print_json_lines(plan.raw for plan in found)
            return
        print_table(
            ("PLAN", "JOB", "MODEL", "STATE", "SPECIALIZATION", "BACKEND", "ROWS", "DONE", "TRIES", "NODE", "WAITS FOR"),
            [
                (
                    plan.id,
                    plan.raw.get("job_id"),
                    plan.raw.get("model"),
                    plan.state,
                    plan.runtime_plan.specialization_state,
                    plan.runtime_plan.backend_id,
                    plan.row_count,
                    plan.raw.get("rows_done"),
                    plan.attempt,
                    plan.raw.get("node"),
                    plan.condition,
                )
                for plan in found
            ],
        )


def show_plan(plan_id: PlanId, as_json: AsJson = False) -> None:
    """Show one plan with its history and every try."""
    with Client() as client:
        plan = client.plan(plan_id)
    if as_json:
        print_json(plan.raw)
        return
    print_facts({"plan": plan.id, "state": plan.state, "rows": plan.row_count, "class": plan.class_id})
    print_plan(plan.runtime_plan, plan.condition)
    say("")
    _print_history(plan)
    for attempt in plan.attempts:
        placement = attempt.placement
        say("")
        print_facts(
            {
                f"try {attempt.number}": f"{attempt.outcome} on {attempt.node}",
                "placement": ", ".join(str(placement[name]) for name in ("tier", "device_id") if name in placement),
                "micro-batch": placement.get("micro_batch"),
                "memory": memory_in_words(attempt),
                "estimated": _in_words(attempt.estimate),
                "measured": _in_words(attempt.measured),
            }
        )


def print_plan(plan: RuntimePlan, condition: str | None) -> None:
    """How a plan runs, and why so."""
    print_facts(
        {
            "runs on": plan.backend_id or "nothing",
            "why": plan.reason,
            "passes": ", ".join(plan.specialization_pass_ids),
            "passes are": plan.specialization_state if plan.specialization_pass_ids else None,
            "evidence": "; ".join(f"{name}: {how}" for name, how in evidence(plan).items()),
            "waits for": condition,
        }
    )


def evidence(plan: RuntimePlan) -> dict[str, str]:
    """What each pass left in a finalized plan: `applied(…)`, `not-needed(…)` or `failed(…)`."""
    found = {pass_id: plan.details.get(f"pass_{pass_id.replace('-', '_')}") for pass_id in plan.specialization_pass_ids}
    return {str(pass_id): how for pass_id, how in found.items() if how}


def _print_history(plan: Plan) -> None:
    rows = [(event.at, event.kind, event.before, event.after, event.node, event.reason) for event in plan.events]
    print_table(
        ("WHEN", "WHAT", "FROM", "TO", "NODE", "WHY"),
        [(at.astimezone().strftime("%H:%M:%S.%f")[:-3], kind, *rest) for at, kind, *rest in rows],
    )


def memory_in_words(attempt: Attempt) -> str:
    """What its device was expected to hold beside the most that it held: `9.0 GiB estimated, 8.7 GiB at the most`."""
    said = []
    if attempt.estimate:
        said.append(f"{bytes_in_words(from_json(MemoryEstimate, attempt.estimate).device_bytes)} estimated")
    peak = attempt.measured.get("peak_device_bytes")
    if isinstance(peak, int | float):
        said.append(f"{bytes_in_words(peak)} at the most")
    return ", ".join(said)


def _in_words(figures: Mapping[str, object]) -> str:
    """Numbers with their names; those that are bytes as such."""
    words = []
    for name, value in figures.items():
        is_bytes = isinstance(value, int | float) and ("bytes" in name or name in _BYTES)
        words.append(f"{name} {bytes_in_words(value) if is_bytes and isinstance(value, int | float) else value}")
    return ", ".join(words)


_BYTES = frozenset(field.name for field in fields(MemoryEstimate))
