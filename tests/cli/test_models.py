"""What does `ollm-service models` say of the fleet's models, and what does it ask for?"""

import json
import threading
from dataclasses import replace

from ollm_service.coordinator.service import Service
from ollm_service.core.retry import Failure
from tests.cli.conftest import Command
from tests.store.samples import PROFILE, new_lease, new_worker
from tests.waiting import wait_for

LARGE = replace(PROFILE, name="large", digest="e" * 64, weight_bytes=5 * 1024**3, layer_count=32, kv_bytes_per_token=1024)


def test_models_are_listed_in_one_line_each(command: Command, service: Service) -> None:
    """With digest, size, layers and holders; two digests of one name are two lines; refused and absent ones have a remark."""
    spoilt = replace(PROFILE, name="spoilt", digest="", unsafe_because="its weights are pickled")
    new_worker(service.store, "attic", models=(LARGE, spoilt), may_download=True)
    new_worker(service.store, "cellar", models=(replace(LARGE, digest="a1" * 32),))
    assert command("models", "pull", "org/name").returncode == 0
    told = command("models", "list").stdout
    assert told == command("models").stdout
    lines = [line for line in told.splitlines() if line.startswith("large")]
    assert [line.split()[1:9] for line in lines] == [
        ["a1a1a1a1a1a1", "causal-lm", "LlamaForCausalLM", "float32", "5.0", "GiB", "32", "cellar"],
        ["eeeeeeeeeeee", "causal-lm", "LlamaForCausalLM", "float32", "5.0", "GiB", "32", "attic"],
    ]
    assert "refused: its weights are pickled" in told
    assert "no worker has it yet (unsloth/Meta-Llama-3.1-8B-Instruct)" in told
    assert "org/name: waits for a worker" in told
    printed = [json.loads(line) for line in command("models", "--json").stdout.splitlines()]
    assert printed == [json.loads(line) for line in command("models", "list", "--json").stdout.splitlines()]
    assert {"large", "spoilt", "llama3-1B-chat", "org/name"} <= {model["id"] for model in printed}


def test_one_model_is_shown_whole(command: Command, service: Service) -> None:
    """Its figures, its holders, each digest, and what a plan would need; an unknown name is a wrong reference."""
    new_worker(service.store, "attic", models=(LARGE,))
    new_worker(service.store, "cellar", models=(replace(LARGE, digest="a1" * 32),))
    told = command("models", "show", "large").stdout
    for fact in (
        "weights 5.0 GiB",
        "KV cache 1.0 KiB a token",
        "it needs memory of 5.0 GiB, float32",
    ):
        assert fact in " ".join(told.split())
    assert "a1a1a1a1a1a1  5.0 GiB  float32  cellar" in told
    alias = command("models", "show", "llama3-8B-chat").stdout
    assert "in the catalog as  llama3-8B-chat" in alias
    assert "the right to download unsloth/Meta-Llama-3.1-8B-Instruct" in alias
    assert json.loads(command("models", "show", "large", "--json").stdout)["profile"]["layer_count"] == 32
    for unknown in ("nothing", "org/nothing", "../x"):
        done = command("models", "show", unknown)
        assert (done.returncode, done.stdout) == (2, "")
    assert "ollm-service models pull org/nothing" in command("models", "show", "org/nothing").stderr


def test_a_model_is_asked_for_and_followed_to_its_end(command: Command, service: Service) -> None:
    """`--wait` exits 1 with the reason where it failed; what is there already is said so; what is not on the hub is refused."""
    worker = new_worker(service.store, "attic", may_download=True)
    assert command("models", "pull", "tiny").returncode == 2
    assert command("models", "pull", "org/name", "--worker", "nowhere").returncode == 1
    asked = json.loads(command("models", "pull", "org/name", "--worker", "attic", "--json").stdout)
    assert (asked["download"]["target"], asked["held_by"]) == ("attic", [])
    lease = new_lease()
    service.store.downloads.claim(worker, "attic", lease, lambda _: True)
    service.store.downloads.fail(lease, Failure(code="gated", message="set HF_TOKEN on the worker", is_permanent=True))
    job = json.loads(command("submit", "-", "-m", "org/name", "--json", given=b'{"prompt": "a"}\n').stdout)
    assert "downloads  org/name: failed, on attic: set HF_TOKEN on the worker" in command("job", job["id"]).stdout
    assert "org/name: failed, on attic: set HF_TOKEN on the worker" in command("models", "show", "org/name").stdout
    service.store.leases.retire(worker)
    new_worker(service.store, "cellar", models=(replace(PROFILE, name="org--name"),), may_download=True)
    assert command("models", "pull", "org/name").stdout == "org/name is on cellar already.\n"


def test_following_a_download_says_how_far_it_is(process: Command, service: Service) -> None:
    """Until it is done, or has failed: then the exit status is 1."""
    worker = new_worker(service.store, "attic", may_download=True)
    _end_when_asked(service, worker, fails=True)
    failed = process("models", "pull", "org/name", "--wait")
    assert (failed.returncode, failed.stdout.partition(": ")[2]) == (1, "org/name: failed, on attic: it is gated\n")
    _end_when_asked(service, worker, fails=False)
    done = process("models", "pull", "org/name", "--wait")
    assert (done.returncode, done.stdout.partition(": ")[2]) == (0, "org/name: done, on attic\n")


def _end_when_asked(service: Service, worker: str, *, fails: bool) -> None:
    """A worker's thread that ends the next download as soon as it is there."""

    def work() -> None:
        lease, downloads = new_lease(), service.store.downloads
        wait_for(lambda: downloads.claim(worker, "attic", lease, lambda _: True), timeout=60, what="a download")
        downloads.progress(lease, 1024, bytes_total=4096)
        if fails:
            downloads.fail(lease, Failure(code="gated", message="it is gated", is_permanent=True))
        else:
            downloads.finish(lease)

    threading.Thread(target=work, daemon=True).start()
