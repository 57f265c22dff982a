"""Does the benchmark of GPUs run, as far as it can be told without one?"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import copies, overlap, ratios
from bench.gpu_attempts import Bench, Sizes, against_bounds, equal_tokens, make_model, steps
from tests.runner.models import ROOT

TINY = Sizes(
    copies=[2**20],
    square=64,
    hidden=128,
    layers=2,
    vocabulary=200,
    batches=[1, 3],
    prompt=8,
    answer=4,
    job_rows=4,
    job_batch=2,
    shared=20,
    repeats=1,
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so_in_one_line() -> None:
    """And prints no figures."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "bench/gpu.py: no CUDA device that torch can use, so nothing was measured\n"


def test_its_parts_run_with_the_cpu_as_the_device(tmp_path: Path) -> None:
    """Copies, products beside them, steps with the layers in host memory, and tokens equal to those of the resident model."""
    bench = Bench(torch.device("cpu"), TINY, tmp_path, time.monotonic() + 1000)
    make_model(tmp_path / "models" / "llama", TINY, bench.device, torch.float32)
    bench.part("copies", lambda: copies(bench))
    bench.part("overlap", lambda: overlap(bench))
    bench.part("equal_rows_float32", lambda: equal_tokens(bench, tmp_path / "models"))
    bench.part("steps_from_host", lambda: steps(bench, tmp_path / "models", TINY.batches, "from_host", 1e-9))
    assert bench.found["left_out"] == []
    assert bench.found["copies"][0]["pinned_gb_per_s"] > 0
    assert bench.found["equal_rows_float32"] == {"from_host": 1.0, "from_disk": 1.0}
    found = bench.found["steps_from_host"]
    assert [row["rows"] for row in found] == TINY.batches
    assert [row["step_over_longer_of_both"] for row in against_bounds(found, found)] == [1.0, 1.0]
    assert set(ratios(bench.found)) == {"largest_peak_over_estimate"}


def test_parts_that_come_too_late_or_fail_are_named(tmp_path: Path) -> None:
    """The others keep their figures."""
    late = Bench(torch.device("cpu"), TINY, tmp_path, time.monotonic() - 1)
    late.part("copies", lambda: copies(late))
    assert late.found == {"left_out": ["copies: no time left"]}
    failing = Bench(torch.device("cpu"), TINY, tmp_path, time.monotonic() + 1000)
    failing.part("steps", lambda: steps(failing, tmp_path / "nowhere", [1], "resident", 0.0))
    assert failing.found["left_out"][0].startswith("steps: ")


def test_a_card_gets_a_model_of_an_eighth_of_its_memory_at_most() -> None:
    """And of two layers at least, as one alone has nothing to overlap with."""
    for gib in (4, 8, 12, 24, 80, 140):
        sizes = Sizes.of(gib * 1024**3)
        layers = sizes.layers * 2 * (4 * sizes.hidden**2 + 3 * sizes.hidden * 11 * sizes.hidden // 4)
        assert sizes.layers >= 2
        assert layers <= gib * 1024**3 / 8
