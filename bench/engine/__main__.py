"""How fast is the engine beside its peers, and how much memory does it take? Runs every comparison and prints the figures.

Models are made by the script. Everything that is compared runs in a process of its own, the parts of a pair one right after the
other, and every other pair in the opposite order. Streamed cold: the page cache of the files that accelerate reads is dropped
before each of its passes; ours reads past the page cache. Figures are medians over the pairs; `--json` prints one object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.engine.comparisons import Comparison, Part, comparisons
from bench.engine.made import MODELS, dtype, model_folder
from bench.engine.ours import Measured, Setting, ours
from bench.engine.peers import accelerated, continuous, disk, generated
from bench.hardware import hardware


class Bench:
    """The comparisons that were asked for, in a folder for models."""

    def __init__(self, folder: Path, *, is_quick: bool, keeps_models: bool) -> None:
        self._folder = folder
        self._is_quick = is_quick
        self._keeps_models = keeps_models

    def run(self, wanted: Mapping[str, tuple[Comparison, Sequence[str]]], pairs: int | None) -> dict[str, dict[str, Any]]:
        """For each comparison its figures, what every pair has measured, and the seconds that it took."""
        found: dict[str, dict[str, Any]] = {}
        left = [comparison.model for comparison, _ in wanted.values()]
        for name, (comparison, keys) in wanted.items():
            began = time.monotonic()
            self._prepare(comparison.model)
            prepared = time.monotonic()
            measured = self._pairs(name, comparison, keys, pairs or comparison.pairs)
            found[name] = {
                "figures": {key: statistics.median(comparison.figures[key].ratio(pair) for pair in measured) for key in keys},
                "pairs": measured,
                "load_seconds": round(prepared - began, 1),
                "seconds": round(time.monotonic() - prepared, 1),
            }
            print(f"{name}: {found[name]['figures']}, {time.monotonic() - began:.0f} s", file=sys.stderr)
            left.remove(comparison.model)
            if comparison.model not in left and not self._keeps_models:
                shutil.rmtree(self._folder / comparison.model)
        return found

    def _prepare(self, model: str) -> None:
        """Have the model made, and its weights laid out as our runner reads them."""
        own = model_folder(self._folder, model)
        if not (own / "config.json").is_file():
            free = shutil.disk_usage(self._folder).free
            if free < MODELS[model].disk_bytes:
                needed = MODELS[model].disk_bytes
                raise SystemExit(f"{model} takes {needed:,} bytes of disk and {free:,} are free: name another --folder")
            self._child("make", {"model": model})
            self._child("ours", {"model": model, "rows": "warm-up", "at_a_time": 1, "warm_up": None})
            os.sync()

    def _pairs(self, name: str, comparison: Comparison, keys: Sequence[str], pairs: int) -> list[dict[str, Measured]]:
        needed = {part for key in keys for part in comparison.figures[key].parts}
        found = []
        for number in range(pairs):
            names = [part for part in comparison.parts if part in needed]
            load, pair = os.getloadavg()[0], {}
            for part in names[:: -1 if number % 2 else 1]:
                pair[part] = self._part(comparison.parts[part])
            pair["machine"] = {"load": load}
            found.append(pair)
            told = ", ".join(f"{key} {comparison.figures[key].ratio(pair):.3f}" for key in keys)
            print(f"{name}, {number + 1} of {pairs}: {told}", file=sys.stderr)
        return found

    def _part(self, part: Part) -> Measured:
        return self._child(part.function, part.arguments)

    def _child(self, function: str, arguments: Mapping[str, Any]) -> Measured:
        """Run one function in a process of its own. Raises SystemExit with its last lines where that fails."""
        told = {"function": function, "folder": str(self._folder), "is_quick": self._is_quick, "arguments": dict(arguments)}
        done = subprocess.run(
            [sys.executable, "-m", "bench.engine", "--child"], input=json.dumps(told), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{function} of {arguments} failed:\n" + "\n".join(done.stderr.splitlines()[-12:]))
        measured: Measured = json.loads(done.stdout.splitlines()[-1])
        return measured


def run_child(told: Mapping[str, Any]) -> Measured:
    """What a process of its own does."""
    folder, is_quick, arguments = Path(told["folder"]), told["is_quick"], told["arguments"]
    match told["function"]:
        case "make":
            MODELS[arguments["model"]].make(model_folder(folder, arguments["model"]), is_quick)
            return {}
        case "ours":
            return ours(folder, Setting(**arguments), is_quick=is_quick)
        case "accelerated":
            return accelerated(folder, is_quick=is_quick, **arguments)
        case "generated":
            return generated(folder, is_quick=is_quick, **arguments)
        case "continuous":
            return continuous(folder, is_quick=is_quick, **arguments)
        case "disk":
            return disk(folder, **arguments)
        case unknown:
            raise SystemExit(f"there is no part {unknown}")


def chosen(all_of_them: Mapping[str, Comparison], only: Sequence[str] | None) -> dict[str, tuple[Comparison, Sequence[str]]]:
    """The comparisons that give any of these keys, and which; all of them without a choice."""
    found: dict[str, tuple[Comparison, Sequence[str]]] = {}
    for name, comparison in all_of_them.items():
        keys = [key for key in comparison.figures if only is None or key in only]
        if keys:
            found[name] = (comparison, keys)
    return found


def main() -> None:
    """Run the comparisons, or one part for the process that compares."""
    keys = [key for comparison in comparisons().values() for key in comparison.figures]
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs="+", choices=keys, metavar="KEY", help="figures to measure: " + ", ".join(keys))
    parser.add_argument("--pairs", type=int, help="pairs of every comparison, instead of as many as each has by default")
    parser.add_argument("--quick", action="store_true", help="one pair each of much less work: shows that all runs, no more")
    parser.add_argument("--folder", type=Path, help="where the models go, and stay; a temporary one unless given")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(run_child(json.load(sys.stdin))))
        return
    if given.pairs is not None and given.pairs < 1:
        parser.error("--pairs: at least 1")
    machine = {**hardware(), "torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(dtype())}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ollm-bench-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, is_quick=given.quick, keeps_models=given.folder is not None)
        found = bench.run(chosen(comparisons(is_quick=given.quick), given.only), 1 if given.quick else given.pairs)
    figures = {key: value for comparison in found.values() for key, value in comparison["figures"].items()}
    if given.json:
        seconds = round(time.monotonic() - began, 1)
        print(json.dumps({"hardware": machine, "is_quick": given.quick, "seconds": seconds, **figures, "comparisons": found}))
    else:
        for key, value in figures.items():
            print(f"{key:40} {value:.3f}")


if __name__ == "__main__":
    main()
