"""Do rows get the same tokens on a CUDA device as on the CPU, wherever their weights, keys and values are? In float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import Applied
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute, Finished
from tests.runner.commands import first_outcomes, make_command, only, results_of, run, work_row
from workers.runner.engine import Engine

pytestmark = pytest.mark.gpu

FAMILIES = ("llama", "gpt-oss", "qwen3-moe")
SHARED = "All of them begin with the same words, "
PROMPTS = [SHARED + "one", SHARED + "and two", "3", "a row of its own, which is longer than a window of sixteen tokens"]
NEW_TOKENS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where the layers of a model of four are, or of one of two."""

    in_host: tuple[int, ...] = ()
    on_disk: tuple[int, ...] = ()
    is_routed: bool = False
    vocabulary_on_disk: bool = False

    def of(self, layers: int) -> "Where":
        """The same for a model of so many layers."""
        kept = [tuple(layer for layer in named if layer < layers) for named in (self.in_host, self.on_disk)]
        return replace(self, in_host=kept[0], on_disk=kept[1])


PLACES = {
    "resident": Where(),
    "from-disk": Where(on_disk=(0, 1, 2, 3)),
    "one-from-disk": Where(on_disk=(1,)),
    "from-host-memory": Where(in_host=(0, 1, 2, 3)),
    "from-both": Where(in_host=(0, 2), on_disk=(1, 3)),
    "vocabulary-too": Where(on_disk=(0, 1, 2, 3), vocabulary_on_disk=True),
    "routed-from-disk": Where(on_disk=(0, 1, 2, 3), is_routed=True),
    "routed-from-both": Where(in_host=(0, 2), on_disk=(1, 3), is_routed=True),
}


def rows(**generation: object) -> list[WorkRow]:
    """A row for each prompt."""
    return [work_row(number, prompt, max_new_tokens=NEW_TOKENS, **generation) for number, prompt in enumerate(PROMPTS)]


def order(
    model: Path,
    cache: Path,
    device: torch.device,
    given: Sequence[WorkRow],
    where: Where,
    kv: KVCacheStrategy = KVCacheStrategy.RESIDENT,
) -> Execute:
    """Answer the rows on the device."""
    passes = [PassId.CPU_OFFLOAD] if where.in_host or where.on_disk else []
    passes = [PassId.MOE_ROUTING, *passes] if where.is_routed else passes
    passes = passes if kv is KVCacheStrategy.RESIDENT else [PassId.DISK_CACHE, *passes]
    made = make_command(
        model,
        given,
        passes=passes,
        micro_batch=3,
        kv=kv,
        cache_dir=cache,
        disk_layers=where.on_disk,
        vocabulary_on_disk=where.vocabulary_on_disk,
    )
    return replace(made, placement=replace(made.placement, device_id=str(device), host_layers=where.in_host))


def texts(found: Execute) -> dict[int, str | None]:
    """The text of each row, from an engine of its own; every planned pass took effect."""
    messages = run(Engine(), found)
    only(messages, Finished)
    assert all(isinstance(outcome, Applied) for outcome in first_outcomes(messages).values())
    return {row: result.text for row, result in results_of(messages).items()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_cpu(
    device: torch.device, families: Callable[[str], Path], tmp_path: Path, family: str, place: str
) -> None:
    """For rows that share a beginning and rows that do not, some of which join while others run."""
    if family == "llama" and PLACES[place].is_routed:
        pytest.skip("a llama has no experts")
    model, where = families(family), PLACES[place].of(2 if family == "llama" else 4)
    expected = texts(make_command(model, rows(), micro_batch=3))
    assert texts(order(model, tmp_path, device, rows(), where)) == expected
    assert all(expected.values())


def test_a_warm_model_streams_again(device: torch.device, families: Callable[[str], Path], tmp_path: Path) -> None:
    """Slots are given up at the end of a plan and taken anew for the next."""
    model, engine = families("llama"), Engine()
    asked = order(model, tmp_path, device, rows(), Where(in_host=(0,), on_disk=(1,)))
    first, again = results_of(run(engine, asked)), results_of(run(engine, asked))
    assert first == again
    assert {row: result.text for row, result in first.items()} == texts(make_command(model, rows(), micro_batch=3))


def test_rows_with_a_seed_draw_the_same_tokens(device: torch.device, families: Callable[[str], Path], tmp_path: Path) -> None:
    """The draws are made on the CPU, with each row's own generator."""
    model, drawn = families("llama"), rows(temperature=0.8, top_p=0.9, seed=7)
    assert texts(order(model, tmp_path, device, drawn, Where())) == texts(make_command(model, drawn, micro_batch=3))


@pytest.mark.parametrize("place", ["resident", "from-both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_in_pages_keep_the_tokens(
    device: torch.device, families: Callable[[str], Path], tmp_path: Path, family: str, place: str
) -> None:
    """They go to files from the device and come back to it bit by bit."""
    model, where = families(family), PLACES[place].of(2 if family == "llama" else 4)
    expected = texts(make_command(model, rows(), micro_batch=3))
    assert texts(order(model, tmp_path, device, rows(), where, KVCacheStrategy.PAGED)) == expected


def test_a_ring_keeps_the_tokens_of_a_ring_on_the_cpu(
    device: torch.device, families: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same tokens leave the window."""
    model, ring = families("llama"), KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER
    config = RuntimeConfig(kv_cache_window_tokens=16)
    found = [
        replace(order(model, tmp_path / kind.type, kind, rows(), Where(), ring), config=config)
        for kind in (device, torch.device("cpu"))
    ]
    assert texts(found[0]) == texts(found[1])


def test_quantized_keys_and_values_answer_every_row(
    device: torch.device, families: Callable[[str], Path], tmp_path: Path
) -> None:
    """Inexact by definition, so what counts is that int8 was written and that no row failed."""
    found = texts(order(families("llama"), tmp_path, device, rows(), Where(), KVCacheStrategy.QUANTIZED_COLD_TIER))
    assert len(found) == len(PROMPTS)
    assert all(found.values())
