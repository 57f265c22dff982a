"""Does explain say in words that a person would use where rows are and what stands in their way?"""

import json
import re
from dataclasses import replace

import pytest

from ollm_service.cli.explain import _where_rows_are
from ollm_service.cli.output import reason_in_words
from ollm_service.coordinator.service import Service
from tests.cli.conftest import Command
from tests.coordinator.services import claim_one
from tests.store.samples import LIVE, PROFILE, capabilities, new_worker

MODEL = replace(PROFILE, layer_count=2, hidden_size=64, intermediate_size=256, vocabulary_size=100, kv_bytes_per_token=100_000)


def rows(*prompts: str) -> bytes:
    """A file of these prompts."""
    return b"".join(json.dumps({"prompt": prompt}).encode() + b"\n" for prompt in prompts)


def submitted(command: Command, *prompts: str, options: tuple[str, ...] = ()) -> str:
    """A job of these prompts."""
    return command("submit", "-", "-m", "tiny", *options, given=rows(*prompts)).stdout.strip()


def test_a_few_long_rows_are_named_while_the_rest_runs(command: Command, service: Service) -> None:
    """They fit nobody who is connected; what they need is told in GiB, and who would have room when it returns."""
    large = replace(LIVE, device_free_bytes={"cpu": 10**11})
    store = service.store
    cpu = replace(capabilities().devices[0], memory_bytes=10**11)
    store.leases.register("wkr_large", capabilities("desktop", devices=(cpu,), models=(MODEL,)), large, pid=1)
    store.leases.retire("wkr_large")
    worker_id = new_worker(store, "laptop", models=(MODEL,))
    job_id = submitted(command, "a", "x" * 12_000, "b", "c", options=("--no-cache",))
    claim_one(service, worker_id)
    told = command("explain", job_id).stdout
    first, second, way, laptop, desktop = told.splitlines()
    assert first == "1 of 4 rows fit no connected worker. The rest are running."
    assert second == "This cannot hold:"
    assert re.fullmatch(rf" 1 rows over [\d,]+ tokens  → skip row 1  ollm-service amend {job_id} --skip-rows 1", way), way
    parts = r"KV 1\.\d GiB, weights 1000 B, work [\d.]+ MiB"
    assert re.fullmatch(rf"laptop   needs 1\.\d GiB on cpu \(all on device: {parts}\); 506 MiB usable", laptop), laptop
    assert re.fullmatch(r"desktop  offline since \d\d:\d\d; fits; its plans start by themselves when it returns", desktop), (
        desktop
    )
    command(*way.split("ollm-service ")[1].split())
    assert command("explain", job_id).stdout.startswith("Of 4 rows 1 have a result and 3 are running.")


def test_what_must_go_together_is_said_plainly(command: Command, service: Service) -> None:
    """With one command for all of it."""
    new_worker(service.store, "attic", models=(MODEL,))
    job_id = submitted(command, "a", options=("--where", 'zone == "home"', "--device", "cuda"))
    told = command("explain", job_id).stdout
    assert told.startswith("No connected worker fits any row.\n")
    assert 'no single one is enough. Give up all of them together:\n - zone == "home"\n - device cuda\n' in told
    assert f"   ollm-service amend {job_id} --where any --device any\n" in told


def test_a_model_that_nobody_has_is_said_to_be_fetched_first(command: Command, service: Service) -> None:
    """A worker that may fetch it does not claim that it can take the plan."""
    both = {"optimized-native": None, "transformers-generic": None}
    new_worker(service.store, "attic", may_download=True, backends=both)
    job_id = command("submit", "-", "-m", "org/name", given=rows("a")).stdout.strip()
    told = command("explain", job_id).stdout
    assert re.search(r"^attic +may fetch the model; whether it has room is known then$", told, re.MULTILINE), told
    assert "can take it" not in told


def test_where_nobody_is_connected_that_is_said(command: Command, service: Service) -> None:
    """And who was there once."""
    worker_id = new_worker(service.store, "attic", models=(MODEL,))
    job_id = submitted(command, "a")
    service.store.leases.retire(worker_id)
    told = command("explain", job_id).stdout
    assert "No worker is connected.\n" in told
    assert "attic  offline since " in told


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("memory: 16,106,127,360 bytes needed, cuda:0 has 8,589,934,592", "memory: 15.0 GiB needed, cuda:0 has 8.0 GiB"),
        ("for one row of 131,072 tokens, 1,073,741,824 free", "for one row of 131,072 tokens, 1.0 GiB free"),
        ("pass disk-cache: 0 bytes there", "pass disk-cache: 0 B there"),
    ],
)
def test_bytes_are_told_as_people_read_them(reason: str, words: str) -> None:
    """Tokens stay numbers."""
    assert reason_in_words(reason) == words


@pytest.mark.parametrize(
    ("answered", "running", "waiting", "stuck", "words"),
    [
        (0, 39_997, 3, 3, "3 of 40,000 rows fit no connected worker. The rest are running."),
        (39_997, 0, 3, 3, "3 of 40,000 rows fit no connected worker. The rest have a result."),
        (
            30_000,
            256,
            9_744,
            3,
            "3 of 40,000 rows fit no connected worker. "
            "Of the rest 30,000 have a result, 256 are running and 9,741 wait for their turn.",
        ),
        (0, 0, 40_000, 40_000, "No connected worker fits any row."),
        (40_000, 0, 0, 0, "Of 40,000 rows 40,000 have a result."),
    ],
)
def test_where_all_rows_are(answered: int, running: int, waiting: int, stuck: int, words: str) -> None:
    """One sentence or two."""
    found = {"row_count": 40_000, "answered": answered, "running": running, "waiting": waiting, "stuck": stuck}
    assert _where_rows_are(found) == words
