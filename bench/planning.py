"""What does it cost to decide: a large submission, the match of one plan against a large fleet, the placement of one plan?

The submission goes over HTTP to a coordinator in a process of its own, on SQLite as `ollm-service up` has it and, where it is
installed, on a private PostgreSQL. Matching and placement are functions, timed here. Prints figures and judges none.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import psutil

from bench.hardware import hardware
from ollm_service.core.capabilities import CacheDisk, Capabilities, Device, LiveState
from ollm_service.core.matching import match_fleet
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import PASS_TRAITS
from ollm_service.core.placement import Placement, RowBounds, Unplaceable, place
from ollm_service.core.plan import BackendId, GenericModelKind, NativeFamily
from ollm_service.core.planning import Planned, plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements, requirements_of
from ollm_service.core.resolution import HeldModel
from ollm_service.settings import MEMORY_BROKER
from ollm_service.store.database import open_database, upgrade
from tests.e2e.fleet import Fleet
from tests.servers import LOOPBACK, MissingServer, PostgresServer

GIB = 1024**3
MIB = 1024**2
LAYERS = 32
WORDS = "the quick brown fox jumps over the lazy dog and writes what it has seen into a small notebook"
# Llama 3 with 8 billion parameters in bfloat16: what its configuration says.
MODEL = ModelProfile(
    name="llama3-8B-chat",
    path=PurePosixPath("llama3-8B-chat"),
    digest="8" * 64,
    architecture="LlamaForCausalLM",
    model_type="llama",
    family=NativeFamily.LLAMA,
    kind=GenericModelKind.CAUSAL_LM,
    dtype="bfloat16",
    weight_bytes=16_060_522_496,
    parameter_count=8_030_261_248,
    layer_count=LAYERS,
    hidden_size=4096,
    intermediate_size=14_336,
    vocabulary_size=128_256,
    attention_heads=32,
    layer_bytes=(436_224_000,) * LAYERS,
    embedding_bytes=1_050_673_152,
    head_bytes=1_050_673_152,
    kv_bytes_per_token=2 * LAYERS * 8 * 128 * 2,
    max_context_tokens=131_072,
)


def worker(node: str, *, gpu_bytes: int, models: int = 1) -> Capabilities:
    """A worker with a graphics card and everything that exists, which holds the model and so many others."""
    others = (replace(MODEL, name=f"other-{number}", digest=f"{number:064}") for number in range(models - 1))
    return Capabilities(
        node=node,
        slots=1,
        devices=(
            Device(device_id="cuda:0", name="GPU", memory_bytes=gpu_bytes, dtypes=("bfloat16", "float16", "float32")),
            Device(device_id="cpu", name="CPU", memory_bytes=64 * GIB, dtypes=("bfloat16", "float32")),
        ),
        host_memory_bytes=64 * GIB,
        backends=dict.fromkeys(BackendId),
        passes=dict.fromkeys(PASS_TRAITS),
        kv_strategies=dict.fromkeys(KVCacheStrategy),
        models=(MODEL, *others),
        cache_disk=CacheDisk(path="/cache", total_bytes=100 * GIB),
        labels={"zone": "home"},
    )


def planned(config: RuntimeConfig, where: str | None = None) -> tuple[Planned, Requirements]:
    """The plan of the model, and what it needs."""
    found = plan(MODEL.name, [HeldModel(profile=MODEL, workers=("w",))], config)
    return found, requirements_of(found.plan, found.profile, config, where=where)


def milliseconds(act: Callable[[], object], runs: int) -> dict[str, float]:
    """The median and the slowest of so many runs, and the median of the processor time, which a busy machine stretches less."""
    times, worked = [], []
    for _ in range(runs):
        began, began_work = time.perf_counter(), time.thread_time()
        act()
        times.append((time.perf_counter() - began) * 1000)
        worked.append((time.thread_time() - began_work) * 1000)
    return {"median": statistics.median(times), "slowest": max(times), "cpu_median": statistics.median(worked)}


def matching(workers: int, runs: int) -> dict[str, float]:
    """One plan, with a label expression, against a fleet of which every other worker is refused for its labels."""
    config = RuntimeConfig(kv_cache_strategy=KVCacheStrategy.PAGED)
    _, requirements = planned(config, where='zone == "home" and gpu_memory_gb >= 16')
    fleet = {
        f"w{number}": worker(f"node-{number}", gpu_bytes=(8 + 16 * (number % 2)) * GIB, models=5) for number in range(workers)
    }
    found = match_fleet(requirements, fleet)
    assert len(found.eligible) == workers // 2, "the fleet is not what it should be"
    return milliseconds(lambda: match_fleet(requirements, fleet), runs)


def placement(runs: int) -> dict[str, dict[str, float]]:
    """One plan on a worker where the first tier holds it, and on one where every tier of the accelerator is refused."""
    config = RuntimeConfig()
    found, requirements = planned(config)

    def timed(gpu_free: int, longest: int) -> dict[str, float]:
        here = worker("node", gpu_bytes=80 * GIB)
        live = LiveState(
            device_free_bytes={"cuda:0": gpu_free, "cpu": 60 * GIB}, host_free_bytes=60 * GIB, cache_free_bytes=90 * GIB
        )

        def once() -> Placement | Unplaceable:
            assert found.profile is not None
            return place(found.plan, found.profile, config, requirements, here, live, RowBounds(longest=longest, shortest=64))

        once()
        return milliseconds(once, runs)

    return {"first_tier": timed(78 * GIB, 1_500), "no_room_on_gpu": timed(64 * MIB, 30_000)}


def submission(rows: int, characters: int, fleet: Fleet) -> dict[str, float]:
    """Seconds from the first byte of the request to the answer, and the coordinator's work and peak of resident memory."""
    store = open_database(fleet.database_url, lease_ms=30_000)
    store.leases.register("wkr_bench", worker("bench", gpu_bytes=24 * GIB), _free(), pid=1)
    store.close()
    text = (WORDS * (characters // len(WORDS) + 1))[: characters - 8]
    body = json.dumps({"model": MODEL.name, "rows": [{"prompt": f"{number:07} {text}"} for number in range(rows)]}).encode()
    coordinator_process = psutil.Process(fleet.coordinator.pid)
    before, worked = _memory(fleet.coordinator.pid, "VmHWM"), sum(coordinator_process.cpu_times()[:2])
    with httpx.Client(base_url=f"http://{LOOPBACK}:{fleet.port}", timeout=600, trust_env=False) as http:
        began = time.perf_counter()
        answer = http.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
        seconds = time.perf_counter() - began
    answer.raise_for_status()
    return {
        "seconds": seconds,
        "coordinator_cpu_seconds": sum(coordinator_process.cpu_times()[:2]) - worked,
        "peak_mib": _memory(fleet.coordinator.pid, "VmHWM") / MIB,
        "at_rest_mib": before / MIB,
        "body_mib": len(body) / MIB,
        "plans": answer.json()["plans_total"],
    }


def _free() -> LiveState:
    return LiveState(device_free_bytes={"cuda:0": 22 * GIB, "cpu": 60 * GIB}, host_free_bytes=60 * GIB, cache_free_bytes=90 * GIB)


def _memory(pid: int, what: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


@contextmanager
def coordinator(folder: Path, database_url: str) -> Iterator[Fleet]:
    """A coordinator alone on a database of its own."""
    upgrade(database_url)
    with Fleet(folder, database_url=database_url, broker_url=MEMORY_BROKER, lease_seconds=600) as fleet:
        fleet.start_coordinator()
        yield fleet


def submissions(rows: int, characters: int) -> dict[str, Any]:
    """The same submission on each database that is there."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ollm-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with coordinator(folder / "sqlite", f"sqlite:///{folder / 'ollm.db'}") as fleet:
            found["sqlite"] = submission(rows, characters, fleet)
        try:
            with PostgresServer() as postgres, coordinator(folder / "postgres", postgres.create_database()) as fleet:
                found["postgresql"] = submission(rows, characters, fleet)
        except MissingServer as missing:
            found["postgresql"] = f"not measured: {missing} is not installed"
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the submission")
    parser.add_argument("--characters", type=int, default=200, help="characters of each prompt")
    parser.add_argument("--workers", type=int, default=1_000, help="workers to match a plan against")
    parser.add_argument("--runs", type=int, default=50, help="how often matching and placement are timed")
    arguments = parser.parse_args()
    figures = _rounded(
        {
            "hardware": hardware(),
            "submission": submissions(arguments.rows, arguments.characters),
            "match_ms": matching(arguments.workers, arguments.runs),
            "placement_ms": placement(arguments.runs),
        }
    )
    print(json.dumps(figures, indent=None if arguments.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
