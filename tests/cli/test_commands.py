"""Do the verbs do what they say, with the exit codes and the JSON that scripts rely on? A few are run as processes."""

import csv
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ollm_service.coordinator.service import Service
from ollm_service.core.leasing import RowError
from tests.cli.conftest import REPOSITORY, Command, run_process
from tests.client.live import LiveService
from tests.coordinator.services import answer, claim_one
from tests.servers import refused_port
from tests.waiting import wait_for

ROWS = b'{"custom_id": "a", "prompt": "1+1="}\n{"prompt": "2+2="}\n'


def parsed(text: str) -> list[dict[str, Any]]:
    """The JSON lines of an output."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def answering(service: Service, worker_id: str) -> Callable[[], None]:
    """Answer every plan as soon as it can be claimed, from a thread, until one was answered."""

    def work() -> None:
        thread = threading.Thread(target=lambda: answer(service, wait_for(claim, timeout=20, what="a plan")), daemon=True)
        thread.start()

    def claim() -> Any:
        try:
            return claim_one(service, worker_id)
        except AssertionError:
            return None

    return work


def test_submit_prints_the_id_on_standard_output_and_the_plan_beside_it(
    process: Command, service: Service, worker_id: str
) -> None:
    """A script can take the id from standard output; people read why it runs so."""
    done = process("submit", "-", "-m", "tiny", given=ROWS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("job_")
    assert "How it will run: " in done.stderr
    (job,) = service.store.jobs.list("default", limit=9)
    assert (job.job_id, job.row_count) == (done.stdout.strip(), 2)


def test_rows_that_cannot_run_are_told_at_once(process: Command, worker_id: str) -> None:
    """A file of something else is a job of rows that all fail; who does not wait hears of it, too."""
    done = process("submit", "-", "-m", "tiny", given=b"not JSON\n" + ROWS)
    assert done.returncode == 0, done.stderr
    assert "1 row of them cannot run" in done.stderr


def test_waiting_prints_results_as_they_are_stored(process: Command, answering: Callable[[], None]) -> None:
    """--wait gives a JSON line in result shape for each row, and exit code 0."""
    answering()
    done = process("submit", "-", "-m", "tiny", "--wait", given=ROWS)
    assert done.returncode == 0, done.stderr
    results = {line["custom_id"]: line for line in parsed(done.stdout)}
    assert {name: line["text"] for name, line in results.items()} == {"a": "said 1+1=", "row-1": "said 2+2="}
    assert set(results["a"]) >= {"row", "finish_reason", "usage", "error", "plan_id", "attempt", "cursor"}
    assert "2 of 2 rows  succeeded" in done.stderr


def test_a_file_is_replaced_in_one_step_and_in_row_order(command: Command, answering: Callable[[], None], tmp_path: Path) -> None:
    """-o follows the job, leaves nothing beside the file, and with --json prints the job."""
    answering()
    (tmp_path / "out.jsonl").write_text("old\n")
    done = command("submit", "-", "-m", "tiny", "-o", "out.jsonl", "--json", given=ROWS)
    assert done.returncode == 0, done.stderr
    assert [line["row"] for line in parsed((tmp_path / "out.jsonl").read_text())] == [0, 1]
    assert [job["state"] for job in parsed(done.stdout)] == ["succeeded"]
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_rows_that_failed_make_the_exit_code_1_and_are_told(
    command: Command, process: Command, answering: Callable[[], None]
) -> None:
    """The good rows are answered, the malformed one is named with its line, and retry is offered."""
    answering()
    done = process("submit", "-", "-m", "tiny", "--wait", given=ROWS + b"{oops\n")
    assert done.returncode == 1
    assert [line["error"] and line["error"]["code"] for line in parsed(done.stdout)].count("unreadable_row") == 1
    assert "line 3 is not JSON" in done.stderr
    assert "retry" in done.stderr
    job_id = parsed(command("jobs", "--json").stdout)[0]["id"]
    (failed,) = parsed(command("results", job_id, "--failed").stdout)
    assert failed["custom_id"] == "line-3"


def test_a_broken_off_command_goes_on_where_it_was(command: Command, service: Service, worker_id: str, tmp_path: Path) -> None:
    """What was collected before, a torn line apart, is not asked for again; the file is whole in the end."""
    job_id = command("submit", "-", "-m", "tiny", given=ROWS).stdout.strip()
    answer(service, claim_one(service, worker_id))
    first = command("results", job_id).stdout.splitlines()[0]
    kept = json.loads(first) | {"text": "kept"}
    (tmp_path / f".out.jsonl.{job_id}.partial").write_text(json.dumps(kept) + "\n" + first[:20])
    assert command("results", job_id, "-o", "out.jsonl").returncode == 0
    assert sorted(line["text"] for line in parsed((tmp_path / "out.jsonl").read_text())) == ["kept", "said 2+2="]
    assert not list(tmp_path.glob(".out*"))


def test_an_interrupted_command_keeps_what_it_has(live: LiveService, worker_id: str, tmp_path: Path) -> None:
    """Ctrl-C ends a waiting command with 130, without a traceback; the job goes on."""
    command = [sys.executable, "-m", "ollm_service.cli", "submit", "-", "-m", "tiny", "-o", "out.jsonl"]
    environment = {"PYTHONPATH": str(REPOSITORY), "OLLM_BASE_URL": live.url}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(ROWS)
        process.stdin.close()
        wait_for(lambda: list(tmp_path.glob(".out.jsonl.job_*.partial")), timeout=20, what="the job to be followed")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--kv-cache-strategy", "chunked"), 2, "use `paged`"),
        (("--backend", "magic"), 2, "optimized-native"),
        (("--temperature", "-1"), 2, "temperature"),
        (("--max-new-tokens", "many"), 2, "max-new-tokens"),
        (("--offload-gpu-layers", "2"), 3, "gpu-offload"),
        (("--where", "zone = 1"), 2, "label expression"),
        (("--deadline", "soon"), 2, "90s"),
        (("--nonsense",), 2, "nonsense"),
        (("-m", "nobody-has-this"), 2, "tiny"),
        (("-o", "/nowhere/out"), 2, "cannot be written"),
        (("--priority", "99999"), 2, "priority"),
        (("--deadline", "9999d"), 2, "deadline"),
        (("--idempotency-key", ""), 2, "idempotency_key"),
    ],
)
def test_bad_options_end_with_their_exit_code_and_nothing_stored(
    command: Command, service: Service, worker_id: str, arguments: tuple[str, ...], code: int, told: str
) -> None:
    """2 for an option or a reference, 3 for a plan that cannot run, 1 for the rest; always with the reason."""
    done = command("submit", "-", "-m", "tiny", *arguments, given=ROWS)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not service.store.jobs.list("default", limit=1)


def test_the_options_reach_the_service(command: Command, worker_id: str) -> None:
    """Flags become the job's options, none by default."""
    flags = [
        "--no-cache",
        "--dense-projection-chunk-rows",
        "8",
        "--max-new-tokens",
        "5",
        "--stop",
        "a",
        "--stop",
        "b",
        "--seed",
        "7",
        "--priority",
        "3",
    ]
    done = command("submit", "-", "-m", "tiny", *flags, "--deadline", "2h", "--where", 'node == "attic"', "--json", given=ROWS)
    (job,) = parsed(done.stdout)
    assert job["runtime"] == {"use_cache": False, "dense_projection_chunk_rows": 8}
    assert job["generation"] == {"max_new_tokens": 5, "stop": ["a", "b"], "seed": 7}
    assert (job["priority"], job["where"]) == (3, 'node == "attic"')
    assert job["deadline_at"] is not None
    (plain,) = parsed(command("submit", "-", "-m", "tiny", "--json", given=ROWS).stdout)
    assert (plain["runtime"], plain["generation"]) == ({}, {})


def test_the_same_key_submits_once(command: Command, worker_id: str) -> None:
    """--idempotency-key gives the first job back; another file under it is refused."""
    first = command("submit", "-", "-m", "tiny", "--idempotency-key", "k", given=ROWS).stdout
    assert command("submit", "-", "-m", "tiny", "--idempotency-key", "k", given=ROWS).stdout == first
    assert command("submit", "-", "-m", "tiny", "--idempotency-key", "k", given=ROWS[:36]).returncode == 1


def test_a_spreadsheet_is_submitted_by_its_column(command: Command, worker_id: str, tmp_path: Path) -> None:
    """CSV needs the column of its prompts; the error lists the columns."""
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "by"], ["1+1=", "me"]])
    assert command("submit", "in.csv", "-m", "tiny", "--prompt-column", "question").returncode == 0
    done = command("submit", "in.csv", "-m", "tiny")
    assert (done.returncode, "question, by" in done.stderr) == (2, True)


def test_a_preview_tells_the_plan_and_who_can_run_it(command: Command, service: Service, worker_id: str) -> None:
    """For people and as JSON; exit code 3 where nothing could run it; nothing is stored."""
    done = command("preview", "tiny")
    assert done.returncode == 0
    assert "attic: can run it" in done.stdout
    (found,) = parsed(command("preview", "-m", "tiny", "--json").stdout)
    assert found["runtime_plan"]["reason"] in done.stdout
    refused = command("preview", "tiny", "--offload-gpu-layers", "2")
    assert refused.returncode == 3
    assert "gpu-offload" in refused.stdout + refused.stderr
    assert command("preview").returncode == 2
    assert not service.store.jobs.list("default", limit=1)


def test_a_plan_that_waits_is_explained(command: Command, worker_id: str) -> None:
    """explain names the condition, for each worker the clause that refuses it, and the command that drops it; by plan and job."""
    (job,) = parsed(command("submit", "-", "-m", "tiny", "--where", 'zone == "moon"', "--json", given=ROWS).stdout)
    for target in (job["id"], job["plans"][0]["id"]):
        told = command("explain", target).stdout
        assert "no-capable-worker" in told
        assert 'attic  cannot: labels: `zone == "moon"` does not hold here' in told
        assert ' 1 zone == "moon"  → attic, all on device, 256 rows at a time' in told
        assert f"ollm-service amend {job['id']} --where any\n" in told
        (found,) = parsed(command("explain", target, "--json").stdout)
        assert found.get("stuck", found.get("stuck_rows")) == 2
    command(*f"amend {job['id']} --where any".split())
    told = command("explain", job["id"]).stdout
    assert told.startswith("Of 2 rows 2 wait for their turn; every row that waits fits a connected worker.")
    assert "attic  fits: all on device on cpu, 256 rows at a time" in told


def test_a_job_that_waits_is_changed(command: Command, service: Service, worker_id: str) -> None:
    """An option that was demanded is given up with `any`; what is wrong exits 2 and changes nothing."""
    options = ("--where", 'zone == "moon"', "--kv-cache-strategy", "paged", "--dense-projection-chunk-rows", "8", "--json")
    (job,) = parsed(command("submit", "-", "-m", "tiny", *options, given=ROWS).stdout)
    for wrong in (("--skip-rows", "one"), ("--device", "gpu"), ("--where", "zone =")):
        assert command("amend", job["id"], *wrong).returncode == 2
    assert command("amend", job["id"]).returncode == 1
    done = command("amend", job["id"], "--kv-cache-strategy", "any", "--dense-projection-chunk-rows", "any")
    assert (done.returncode, done.stdout) == (0, f"{job['id']}: 1 plan changed.\n")
    assert "It still waits: no-capable-worker" in done.stderr
    (amended,) = parsed(command("amend", job["id"], "--where", "any", "--skip-rows", "1", "--json").stdout)
    assert (amended["where"], amended["runtime"], amended["rows_skipped"]) == (None, {}, 1)
    claim_one(service, worker_id)
    done = command("amend", job["id"], "--device", "cpu", "--skip-rows", "0")
    assert done.stdout == f"{job['id']}: 0 plans changed; 1 that had begun stay as they are.\n{job['id']}: 0 rows skipped.\n"


def test_every_look_has_a_form_for_people_and_one_for_programs(command: Command, service: Service, worker_id: str) -> None:
    """Each listing and showing verb ends with 0 either way, and its JSON parses line by line."""
    (job,) = parsed(command("submit", "-", "-m", "tiny", "--json", given=ROWS).stdout)
    answer(service, claim_one(service, worker_id), errors={1: RowError(code="generation_failed", message="no")})
    plan_id = job["plans"][0]["id"]
    looks = (("job", job["id"]), ("plans", job["id"]), ("plan", plan_id), ("explain", plan_id), ("results", job["id"]))
    for look in (*looks, ("jobs",), ("workers",), ("models",), ("doctor",)):
        people, programs = command(*look), command(*look, "--json")
        assert (people.returncode, programs.returncode) == (0, 0), people.stderr + programs.stderr
        assert people.stdout
        assert parsed(programs.stdout)
    (again,) = parsed(command("retry", job["id"], "--failed", "--json").stdout)
    assert (again["row_count"], again["retry_of"]) == (1, job["id"])
    (cancelled,) = parsed(command("cancel", again["id"], "--json").stdout)
    assert cancelled["state"] == "cancelled"
    assert command("watch", job["id"]).returncode == 1
    assert "queued" in command("plan", plan_id).stdout
    assert parsed(command("drain", "attic", "--json").stdout)[0]["workers"] == 1


def test_plans_without_a_job_are_the_newest(command: Command, worker_id: str) -> None:
    """Of all jobs, twenty unless told otherwise, in one state if wanted; a job's own come all."""
    rows = b"".join(b'{"prompt": "x"}\n' for _ in range(256 * 20 + 1))
    (large,) = parsed(command("submit", "-", "-m", "tiny", "--json", given=rows).stdout)
    (small,) = parsed(command("submit", "-", "-m", "tiny", "--json", given=ROWS).stdout)
    command("cancel", small["id"])
    newest = parsed(command("plans", "--json").stdout)
    assert [plan["job_id"] for plan in newest] == [small["id"]] + [large["id"]] * 19
    assert len(parsed(command("plans", large["id"], "--json").stdout)) == 21
    assert len(parsed(command("plans", large["id"], "--limit", "3", "--json").stdout)) == 3
    (cancelled,) = parsed(command("plans", "--state", "cancelled", "--json").stdout)
    assert cancelled["id"] == small["plans"][0]["id"]
    assert small["id"] in command("plans").stdout
    assert command("plans", "--state", "asleep").returncode == 2


@pytest.mark.parametrize(
    "verb", [("job", "job_no"), ("job", ""), ("plan", "plan_no"), ("results", "job_no"), ("cancel", "x"), ("drain", "x")]
)
def test_what_is_not_there_is_an_error_in_words(command: Command, verb: tuple[str, ...]) -> None:
    """Exit code 1 and one sentence; with --json the envelope on standard error."""
    done = command(*verb)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("ollm-service: ")


def test_errors_have_a_form_for_programs(process: Command) -> None:
    """With --json an error is its envelope on standard error."""
    assert json.loads(process("job", "job_no", "--json").stderr)["error"]["code"] == "not_found"


def test_without_a_service_the_way_to_one_is_told(tmp_path: Path) -> None:
    """A sentence that names the variable and `up`, exit code 1, and doctor says the same."""
    url = f"http://127.0.0.1:{refused_port()}"
    for verb in ("jobs", "doctor"):
        done = run_process(verb, base_url=url, folder=tmp_path)
        assert done.returncode == 1
        told = done.stdout + done.stderr
        assert "OLLM_BASE_URL" in told
        assert "`ollm-service up`" in told
        assert "Traceback" not in told
