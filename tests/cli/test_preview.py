"""What does a preview of a file say, and does `submit --plan` run exactly that?"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ollm_service.cli.preview import duration
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.core.capabilities import Device
from tests.cli.conftest import Command
from tests.store.samples import PROFILE, new_worker

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
    (rows.parent / "broken.json").write_text("{", encoding="utf-8")
    for wrong in ("broken.json", "absent.json", "abacus"):
        done = command("preview", "rows.jsonl", "-m", "tiny", "--if", wrong)
        assert (done.returncode, "if" in done.stderr) == (2, True)


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


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (42, "42 s"), (91, "2 min"), (38_400, "10 h 40"), (5_400, "1 h 30"), (200_000, "2 days 8 h")],
)
def test_durations_are_told_as_people_do(seconds: float, words: str) -> None:
    """The unit follows the length."""
    assert duration(seconds) == words
