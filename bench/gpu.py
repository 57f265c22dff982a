"""What does a CUDA device make of the engine: copies, streaming beside computing, a whole job, memory, tokens?

Runs where torch, transformers, safetensors and accelerate are installed, and nothing else. A Llama with random weights in
bfloat16, sized by the card's memory, is made into a temporary folder. Its layers are in host memory, or on disk, or all on the
card. Parts that would begin after `--seconds` are left out, and named. Prints figures and judges none.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.gpu_attempts import (
    MIB,
    Bench,
    Sizes,
    against_bounds,
    continuous_batch,
    equal_tokens,
    make_model,
    ours,
    profile_of,
    static_batches,
    steps,
)
from workers.runner.raw import pages

# Of a PCI Express lane by generation, in GB/s.
LANE_RATES = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}


def link(device: torch.device) -> dict[str, float]:
    """What the driver says of the card's link; nothing where it has no tool that tells."""
    query = ["nvidia-smi", f"--id={device.index or 0}", "--format=csv,noheader,nounits"]
    fields = "--query-gpu=pcie.link.gen.max,pcie.link.width.max"
    try:
        said = subprocess.run([*query, fields], check=True, capture_output=True, text=True, timeout=20).stdout
        generation, width = (int(field) for field in said.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {"pcie_generation": generation, "lanes": width, "nominal_gb_per_s": LANE_RATES.get(generation, 0.0) * width}


def copies(bench: Bench) -> list[dict[str, float]]:
    """GB/s to the device from locked pages as the engine has them, and from pages as any other."""
    rows = []
    for size in bench.sizes.copies:
        there = torch.empty(size, dtype=torch.uint8, device=bench.device)
        row = {"mib": size / MIB}
        for name, held in (("pinned", pages(size, bench.device)), ("pageable", pages(size))):
            held.fill_(1)
            row[f"{name}_gb_per_s"] = size / bench.seconds(lambda: there.copy_(held, non_blocking=True)) / 1e9  # noqa: B023
        rows.append(row)
    return rows


def overlap(bench: Bench) -> dict[str, float]:
    """1 - (both - longer) / shorter of a copy on a stream of its own and products beside it: 1 where they hinder nothing."""
    size, side = max(bench.sizes.copies), bench.runtime.Stream()
    held, there = pages(size, bench.device), torch.empty(size, dtype=torch.uint8, device=bench.device)
    held.fill_(1)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    square = torch.ones(bench.sizes.square, bench.sizes.square, device=bench.device, dtype=dtype)

    def copy() -> None:
        side.wait_stream(bench.runtime.current_stream())
        with bench.runtime.stream(side):
            there.copy_(held, non_blocking=True)

    copying = bench.seconds(copy)
    times = max(1, round(copying / bench.seconds(lambda: square @ square)))

    def compute() -> None:
        for _ in range(times):
            square @ square

    def both() -> None:
        copy()
        compute()

    computing, together = bench.seconds(compute), bench.seconds(both)
    shorter, longer = sorted((copying, computing))
    return {"copy": copying, "compute": computing, "both": together, "overlap": 1 - (together - longer) / shorter}


def measure(bench: Bench) -> dict[str, Any]:
    """Every part for which there is time, the most telling first."""
    wide, exact, sizes = bench.root / "wide", bench.root / "exact", bench.sizes
    small = replace(sizes, hidden=min(sizes.hidden, 512), layers=min(sizes.layers, 4), vocabulary=min(sizes.vocabulary, 1000))
    bench.part("copies", lambda: copies(bench))
    bench.part("overlap", lambda: overlap(bench))
    make_model(exact / "llama", small, bench.device, torch.float32)
    at_small = Bench(bench.device, small, bench.root, bench.until)
    bench.part("equal_rows_float32", lambda: equal_tokens(at_small, exact))
    make_model(wide / "llama", sizes, bench.device, torch.bfloat16 if bench.device.type == "cuda" else torch.float32)
    profile = profile_of(wide)
    rates = [row["pinned_gb_per_s"] * 1e9 for row in bench.found.get("copies", [])]
    bench.found["model_bytes"] = profile.weight_bytes
    copying = sum(profile.layer_bytes) / max(rates) if rates else 0.0
    bench.part("steps_resident", lambda: steps(bench, wide, sizes.batches, "resident", 0.0))
    bench.part("steps_from_host", lambda: steps(bench, wide, sizes.batches, "from_host", copying))
    bench.found["streamed_step"] = against_bounds(bench.found.get("steps_from_host", []), bench.found.get("steps_resident", []))
    bench.part("job_from_host", lambda: ours(bench, wide, "from_host"))
    bench.part("job_accelerate", lambda: static_batches(bench, wide, is_offloaded=True))
    bench.part("job_resident", lambda: ours(bench, wide, "resident"))
    bench.part("job_generate", lambda: static_batches(bench, wide, is_offloaded=False))
    bench.part("job_generate_batch", lambda: continuous_batch(bench, wide))
    bench.part("steps_from_disk", lambda: steps(bench, wide, [32], "from_disk", copying))
    return {**bench.found, "ratios": ratios(bench.found)}


def ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures that tell most, as far as their parts were measured."""
    wanted = {
        "streamed_job_vs_accelerate": ("job_accelerate", "job_from_host"),
        "resident_job_vs_generate": ("job_generate", "job_resident"),
        "resident_job_vs_generate_batch": ("job_generate_batch", "job_resident"),
    }
    made = {name: found[above] / found[below] for name, (above, below) in wanted.items() if above in found and below in found}
    peaks = [
        row["peak_device_bytes"] / row["estimated_device_bytes"]
        for name in ("steps_resident", "steps_from_host", "steps_from_disk")
        for row in found.get(name, [])
    ]
    return {**made, **({"largest_peak_over_estimate": max(peaks)} if peaks else {})}


def main() -> None:
    """Measure the first CUDA device, or say that there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=420.0, help="no part begins after so many; 420 unless given")
    parser.add_argument("--folder", type=Path, help="where a temporary folder for the models is made")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: no CUDA device that torch can use, so nothing was measured")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    device, until = torch.device("cuda", 0), time.monotonic() + given.seconds
    card: Any = torch.cuda.get_device_properties(device)
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        found = measure(Bench(device, Sizes.of(card.total_memory), Path(root), until))
    hardware = {"card": card.name, "bytes": card.total_memory, "cores": os.cpu_count(), "torch": torch.__version__}
    printed = {"hardware": {**hardware, **link(device)}, **found}
    print(json.dumps(printed) if given.json else json.dumps(printed, indent=2))


if __name__ == "__main__":
    main()
