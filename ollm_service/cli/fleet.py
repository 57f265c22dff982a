"""Which commands look at the machines, and take a node out of service?"""

from typing import Annotated

import typer

from ollm_service.cli.output import AsJson, bytes_in_words, count, print_json, print_json_lines, print_table, say
from ollm_service.client import Client, Worker


def workers(as_json: AsJson = False) -> None:
    """List the workers: what they have, what is free, what they do."""
    with Client() as client:
        found = client.workers()
    if as_json:
        print_json_lines(worker.raw for worker in found)
        return
    if not found:
        say("No workers yet. Start one with `ollm-service worker`.")
        return
    print_table(
        ("NODE", "STATE", "DEVICES", "FREE", "RUNS", "WARM MODEL", "MODELS", "SEEN"),
        [
            (
                worker.node,
                worker.state,
                _devices(worker),
                ", ".join(bytes_in_words(free) for free in worker.live.get("device_free_bytes", {}).values()),
                f"{worker.running} of {worker.raw.get('slots', '?')}",
                _name_of(worker.warm_model, worker),
                ", ".join(worker.usable_models),
                f"{worker.raw.get('heartbeat_age_seconds', 0):.0f} s ago",
            )
            for worker in found
        ],
    )


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="A node's name or a worker's id.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Let a node's workers finish what they do and take nothing new."""
    with Client() as client:
        answer = client.drain(node)
    if as_json:
        print_json(answer)
    else:
        say(f"{count(answer.get('workers', 0), 'worker')} of {node} will finish and take nothing new.")


def _name_of(digest: str | None, worker: Worker) -> str | None:
    models = worker.capabilities.get("models", ())
    return next((str(model["name"]) for model in models if model["digest"] == digest), digest)


def _devices(worker: Worker) -> str:
    devices = worker.capabilities.get("devices", ())
    return ", ".join(f"{device['device_id']} ({bytes_in_words(device['memory_bytes'])})" for device in devices)
