"""What does a preview of a file say, and does `submit --plan` run exactly that?"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ollm_service.cli.preview import _show_long_rows, duration
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.core.capabilities import Device, LiveState
from ollm_service.core.plan import PassId
from tests.cli.conftest import Command
from tests.store.samples import PROFILE, capabilities, new_worker

ROWS = "".join(json.dumps({"prompt": f"{number}+1="}) + "\n" for number in range(300))
MODEL = replace(PROFILE, weight_bytes=1_000_000, layer_count=2, hidden_size=64, intermediate_size=256, kv_bytes_per_token=512)
FAST = Device(
    device_id="cpu", name="a CPU", memory_bytes=10**9, dtypes=("float32",), memory_rate=1e9, arithmetic={"float32": 1e9}
)


@pytest.fixture
def rows(service: Service, tmp_path: Path) -> Path:
    """A file of 300 rows, and a worker whose speed is known."""
    new_worker(service.store, "attic", models=(MODEL,), devices=(FAST,))
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS, encoding="utf-8")
    return path


def test_a_file_is_quoted_in_words(command: Command, service: Service, rows: Path) -> None:
    """How much, when, by whom and how, and how to run it; nothing is stored as a job."""
    done = command("preview", "rows.jsonl", "-m", "tiny", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("300 rows · about ")
    assert "at most 2,400 out" in lines[0]
    assert lines[1].startswith("Done in about ")
    assert "never measured here" in lines[1]
    (attic,) = (line for line in lines if line.startswith("attic"))
    assert attic.endswith("100%")
    assert lines[-1].strip().startswith("ollm-service submit --plan pl_")
    assert not service.store.jobs.list(DEFAULT_TENANT, limit=1)


def test_the_quote_as_json_has_the_promised_keys(command: Command, rows: Path) -> None:
    """`plan` is exactly the RuntimePlan; an imagined machine stands among the workers of the quote."""
    done = command("preview", "rows.jsonl", "-m", "tiny", "--if", "h200", "--json")
    found = json.loads(done.stdout)
    assert set(found) >= {"plan", "resolved_model", "requirements", "class_id", "workers", "placement", "quote"}
    assert found["plan"] == found["runtime_plan"]
    assert [worker["name"] for worker in found["quote"]["workers"]] == ["attic", "if h200"]


def test_every_byte_is_told_where_it_is_asked_for(command: Command, rows: Path) -> None:
    """--why shows the estimate, the rate and where it comes from."""
    told = command("preview", "rows.jsonl", "-m", "tiny", "--why").stdout
    assert "attic in detail:" in told
    assert "from the device's probed speed" in told
    assert "weights" in told
    assert "KV: rule id" in told


def test_a_described_machine_is_read_from_its_file(command: Command, rows: Path) -> None:
    """A file that is no description ends with exit code 2 and a sentence."""
    (rows.parent / "mine.json").write_text('{"name": "mine", "memory_bytes": 8589934592}', encoding="utf-8")
    assert "if mine" in command("preview", "rows.jsonl", "-m", "tiny", "--if", "mine.json").stdout
    labelled = '{"name": "mine", "memory_bytes": 8589934592, "labels": {"zone": "home"}}'
    (rows.parent / "labelled.json").write_text(labelled, encoding="utf-8")
    options = ("--if", "labelled.json", "--where", 'zone == "home"', "--json")
    quoted = json.loads(command("preview", "rows.jsonl", "-m", "tiny", *options).stdout)["quote"]["workers"]
    assert {worker["name"]: worker["placement"] is None for worker in quoted} == {"attic": True, "if mine": False}
    (rows.parent / "broken.json").write_text("{", encoding="utf-8")
    (rows.parent / "odd.json").write_text('{"memory_bytes": 8589934592, "labels": {"zone": []}}', encoding="utf-8")
    for wrong in ("broken.json", "odd.json", "absent.json", "abacus"):
        done = command("preview", "rows.jsonl", "-m", "tiny", "--if", wrong)
        assert (done.returncode, "if" in done.stderr) == (2, True)
    done = command("preview", "tiny", "--if", "mine.json")
    assert (done.returncode, "name a FILE" in done.stderr) == (2, True)


def test_rows_that_nothing_can_be_made_of_are_told(command: Command, rows: Path) -> None:
    """No speed is lacking where no row can be run; each is named with its reason."""
    (rows.parent / "bad.jsonl").write_text("5\n", encoding="utf-8")
    told = command("preview", "bad.jsonl", "-m", "tiny").stdout
    assert "No row can be run." in told
    assert "would fail: line 1 is not a JSON object" in told


def test_rows_for_a_model_that_nobody_has_are_not_passed_over(command: Command, rows: Path) -> None:
    """There is no quote, which is said; what was previewed can be submitted all the same."""
    told = command("preview", "rows.jsonl", "-m", "llama3-8B-chat").stdout
    assert "300 rows, without a quote" in told
    assert "ollm-service submit --plan pl_" in told


def test_a_preview_of_a_model_says_which_one_is_meant(command: Command, service: Service, rows: Path) -> None:
    """Two digests under one name are both shown, with the way to choose."""
    new_worker(service.store, "cellar", models=(replace(MODEL, digest="e" * 64),), devices=(FAST,))
    told = command("preview", "tiny").stdout
    assert "Of 2 different models of that name this is dddddddddddd; the others: eeeeeeeeeeee" in told
    assert "tiny@sha256:DIGEST" in told


def test_submit_runs_what_was_previewed(command: Command, service: Service, rows: Path) -> None:
    """Neither the file nor the model has to be named again; an option besides is refused, and so is a changed file."""
    shown = command("preview", "rows.jsonl", "-m", "tiny", "--max-new-tokens", "5").stdout
    preview_id = shown.split()[-1]
    refused = command("submit", "--plan", preview_id, "--max-new-tokens", "3")
    assert (refused.returncode, "--plan" in refused.stderr) == (2, True)
    done = command("submit", "--plan", preview_id)
    assert done.returncode == 0, done.stderr
    (job,) = service.store.jobs.list(DEFAULT_TENANT, limit=2)
    assert job.row_count == 300
    assert job.generation is not None
    assert job.generation.max_new_tokens == 5
    told = command("job", job.job_id).stdout
    assert "quoted" in told
    assert "never measured here" in told
    assert "took" not in told
    service.store.jobs.cancel(job.job_id, DEFAULT_TENANT)
    assert "took" in command("job", job.job_id).stdout
    rows.write_text(ROWS + '{"prompt": "one more"}\n', encoding="utf-8")
    changed = command("submit", "--plan", preview_id)
    assert (changed.returncode, "changed: the rows" in changed.stderr) == (1, True)
    unknown = command("submit", "--plan", "pl_unknown")
    assert (unknown.returncode, "does not remember" in unknown.stderr) == (2, True)


def test_what_comes_first_is_told(command: Command, service: Service, rows: Path) -> None:
    """How many plans of other jobs, and when this one begins; those of unknown length apart."""
    assert "other jobs" not in command("preview", "rows.jsonl", "-m", "tiny").stdout
    command("submit", "rows.jsonl", "-m", "tiny")
    told = command("preview", "rows.jsonl", "-m", "tiny").stdout.splitlines()
    assert told[2].startswith("2 plans of other jobs come first; this one begins in about "), told
    other = replace(MODEL, name="other", digest="e" * 64, dtype="float16")
    new_worker(service.store, "attic", models=(MODEL, other), devices=(replace(FAST, dtypes=()),))
    command("submit", "rows.jsonl", "-m", "other")
    told = command("preview", "rows.jsonl", "-m", "tiny").stdout.splitlines()
    assert told[3] == "2 plans of other jobs come first and are not counted: how long that takes is not known."


def test_better_ways_without_room_stand_below_their_worker(command: Command, service: Service, rows: Path) -> None:
    """With the bytes that they are short of; a worker that is not used says why, as people read bytes."""
    large = replace(MODEL, digest="e" * 64, weight_bytes=900_000_000, layer_bytes=(100_000_000,) * 8, layer_count=8)
    gpu = Device(device_id="cuda:0", name="a GPU", memory_bytes=2 * 10**9)
    offered = capabilities("laptop", models=(large,), devices=(gpu,), passes={PassId.CPU_OFFLOAD: None}, host_memory_bytes=10**11)
    live = LiveState(device_free_bytes={"cuda:0": 1_500_000_000}, host_free_bytes=10**11, cache_free_bytes=10**10)
    service.store.leases.register("wkr_laptop", offered, live, pid=1)
    small = capabilities("cellar", models=(large,), devices=(replace(FAST, memory_bytes=800_000_000),))
    service.store.leases.register("wkr_cellar", small, live, pid=1)
    lines = command("preview", "rows.jsonl", "-m", f"tiny@sha256:{'e' * 12}").stdout.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("laptop"))
    assert re.match(r"laptop  \d layers? on cuda:0, \d from RAM  +\d+ ", lines[at]), lines
    assert re.fullmatch(r" +all on device on cuda:0: [\d.]+ [MG]iB short", lines[at + 1]), lines
    (cellar,) = (line for line in lines if line.startswith("cellar"))
    assert "not used: memory: 858 MiB needed, cpu has 763 MiB" in cellar


def test_a_vocabulary_that_stays_on_disk_is_told(command: Command, service: Service, rows: Path) -> None:
    """Where neither all layers nor embedding and head fit, the line of the worker says what is read from disk."""
    vocabulary = {"vocabulary_size": 50_000, "hidden_size": 1000, "embedding_bytes": 200_000_000, "head_bytes": 200_000_000}
    layers = {"layer_bytes": (100_000_000,) * 8, "layer_count": 8, "weight_bytes": 1_200_000_000}
    wide = replace(MODEL, digest="e" * 64, **vocabulary, **layers)  # type: ignore[arg-type]
    offered = capabilities("shed", models=(wide,), devices=(FAST,), passes={PassId.CPU_OFFLOAD: None})
    live = LiveState(device_free_bytes={"cpu": 10**9}, host_free_bytes=10**9, laid_out=frozenset({wide.digest}))
    service.store.leases.register("wkr_shed", offered, live, pid=1)
    lines = command("preview", "rows.jsonl", "-m", f"tiny@sha256:{'e' * 12}").stdout.splitlines()
    (found,) = (line for line in lines if line.startswith("shed"))
    assert re.match(r"shed +\d layers? on cpu, \d from disk, vocabulary from disk", found), lines


def test_a_disk_without_room_for_the_weights_is_told(command: Command, service: Service, rows: Path) -> None:
    """Nothing is promised that would end for want of disk: the line of the worker says what laying the weights out needs."""
    layers = {"layer_bytes": (100_000_000,) * 8, "layer_count": 8, "weight_bytes": 1_200_000_000}
    wide = replace(MODEL, digest="e" * 64, **layers)  # type: ignore[arg-type]
    offered = capabilities("shed", models=(wide,), devices=(FAST,), passes={PassId.CPU_OFFLOAD: None})
    live = LiveState(device_free_bytes={"cpu": 1_500_000_000}, host_free_bytes=1_500_000_000, cache_free_bytes=10**9)
    service.store.leases.register("wkr_shed", offered, live, pid=1)
    lines = command("preview", "rows.jsonl", "-m", f"tiny@sha256:{'e' * 12}").stdout.splitlines()
    assert "No worker can run it now." in lines
    (found,) = (line for line in lines if line.startswith("shed"))
    assert re.search(
        r"cache disk: 1.1 GiB needed for the weights by layers and one row of [\d,]+ tokens, 954 MiB usable", found
    ), lines


def test_who_holds_up_the_end_is_named_with_the_option(command: Command, service: Service, rows: Path) -> None:
    """The option, given to the next preview, makes the end as early as was said."""
    slow = replace(FAST, memory_rate=1e5, arithmetic={"float32": 1e5})
    new_worker(service.store, "old box", models=(MODEL,), devices=(slow,))
    told = command("preview", "rows.jsonl", "-m", "tiny").stdout
    (advice,) = (line for line in told.splitlines() if line.startswith("Without "))
    found = re.fullmatch("Without old box it would be done in about (.*): (--where .*)", advice)
    assert found, advice
    assert re.search(r"\n +saves no time\n", told)
    heeded = command("preview", "rows.jsonl", "-m", "tiny", *shlex.split(found[2])).stdout
    assert f"Done in about {found[1]} (" in heeded
    assert "Without " not in heeded


def test_what_labels_cost_is_told_with_the_option(command: Command, service: Service, rows: Path) -> None:
    """A job that no worker with these labels can run would be done somewhere else."""
    told = command("preview", "rows.jsonl", "-m", "tiny", "--where", 'zone == "home"').stdout
    found = re.search(r"On workers with other labels, too, it would be done in about (.+): leave --where out\n", told)
    assert found, told
    assert f"Done in about {found[1]} (" in command("preview", "rows.jsonl", "-m", "tiny").stdout


QUOTED: dict[str, Any] = {"placement": {}, "longest_row_tokens": None, "left_out_rows": 0}


@pytest.mark.parametrize(
    ("limits", "unplaceable", "told"),
    [
        ({"desktop": (None, 0), "laptop": (9_000, 12)}, 0, ["12 rows over 9,000 tokens run on desktop only."]),
        (
            {"desktop": (None, 0), "h200": (None, 0), "laptop": (9_000, 1)},
            0,
            ["1 row over 9,000 tokens runs on desktop and h200 only."],
        ),
        (
            {"laptop": (9_000, 12), "desktop": (30_000, 3), "h200": (None, 0), "old": (9_000, 12)},
            0,
            ["9 rows of 9,001 to 30,000 tokens run on desktop and h200 only.", "3 rows over 30,000 tokens run on h200 only."],
        ),
        (
            {"laptop": (9_000, 12), "desktop": (30_000, 3)},
            3,
            ["9 rows of 9,001 to 30,000 tokens run on desktop only.", "3 rows of up to 99,000 tokens fit no worker."],
        ),
        ({"laptop": (9_000, 12)}, 12, ["12 rows of up to 99,000 tokens fit no worker."]),
        ({"laptop": (None, 0), "desktop": (None, 0)}, 0, []),
    ],
)
def test_rows_that_fit_only_some_workers_are_told_once(
    capsys: pytest.CaptureFixture[str], limits: dict[str, tuple[int | None, int]], unplaceable: int, told: list[str]
) -> None:
    """By their lengths, each with everybody who holds them."""
    workers = [{**QUOTED, "name": name, "longest_row_tokens": most, "left_out_rows": out} for name, (most, out) in limits.items()]
    workers.append({**QUOTED, "name": "phone", "placement": None})
    _show_long_rows({"unplaceable_rows": unplaceable, "longest_row_tokens": 99_000}, workers)
    assert capsys.readouterr().out.splitlines() == told


def test_long_rows_are_told_by_who_holds_them(command: Command, service: Service, rows: Path) -> None:
    """From a file, with workers of several sizes."""
    memory = replace(FAST, memory_bytes=10**11)
    wide = replace(MODEL, digest="e" * 64, kv_bytes_per_token=100_000)
    for node, free in (("laptop", 10**9), ("desktop", 10**11)):
        offered = capabilities(node, models=(wide,), devices=(memory,))
        live = LiveState(device_free_bytes={"cpu": free}, host_free_bytes=free)
        service.store.leases.register(f"wkr_{node}", offered, live, pid=1)
    long = "".join(json.dumps({"prompt": "x" * 80_000}) + "\n" for _ in range(3))
    rows.write_text(ROWS + long, encoding="utf-8")
    told = command("preview", "rows.jsonl", "-m", f"tiny@sha256:{'e' * 12}").stdout
    assert re.search(r"\n3 rows over \d+ tokens run on desktop only\.\n", told), told


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (42, "42 s"), (91, "2 min"), (38_400, "10 h 40"), (5_400, "1 h 30"), (200_000, "2 days 8 h")],
)
def test_durations_are_told_as_people_do(seconds: float, words: str) -> None:
    """The unit follows the length."""
    assert duration(seconds) == words
