"""What is one cell of the exactness grid, and which cells are there? Each is one way of running one family.

The promise: in float32 every cell gives the greedy tokens that plain transformers' `generate` gives for each prompt alone. The
axes are families × exact passes × KV {resident, paged} × placement {streamed, partly resident, resident} × batch {1, 3, 8}.
`make exactness` runs all cells; `make test` runs a pairwise cover of them: every two values of two axes that can meet do meet in
one of its cells. A pass joins by a line in `EXACT_PASSES`; then the cells of its families have it alone and beside their others.

Two exact passes act through an axis of their own: `disk-cache` wherever KV is paged, `cpu-offload` wherever layers are streamed.
`gpu-offload` brings layers by the same code; `gds-export-weights` acts in each streamed cell of GPT-OSS that the planner plans.
`quantized-cold-tier` and `sliding-window-ring-buffer` are not exact, and not here: tests/runner/test_kv_quantized.py and
test_kv_ring.py hold what they promise instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from types import MappingProxyType
from typing import Any

from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.packing import runs_in_packs
from ollm_service.core.plan import BackendId, PassId
from tests import families
from tests.exactness.cover import pairwise_cover
from tests.exactness.families import FAMILIES, SHOWN

BATCHES = (1, 3, 8)
CHUNK_ROWS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactPass:
    """Whose models it acts on, and the options that make it act on prompts as short as the grid's."""

    families: frozenset[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_disk_layers: bool = False  # it has nothing to do where every layer stays


EXACT_PASSES: Mapping[PassId, ExactPass] = MappingProxyType(
    {
        PassId.MLP_CHUNKING: ExactPass(
            families=frozenset({"llama", "gemma3-text", "gemma3", "voxtral", "qwen2"}),
            options={"dense_projection_chunk_rows": CHUNK_ROWS},
        ),
        PassId.MOE_ROUTING: ExactPass(families=frozenset({"qwen3-moe", "qwen3-next", "gpt-oss"}), needs_disk_layers=True),
        PassId.ATTENTION_REPLACEMENT: ExactPass(families=frozenset({"gpt-oss"})),
        PassId.MULTIMODAL_SHELL: ExactPass(families=frozenset(SHOWN), options={"multimodal": True}),
    }
)


class Residency(StrEnum):
    """Which layers stay on the device."""

    RESIDENT = "resident"
    PARTLY = "partly-resident"
    STREAMED = "streamed"

    def disk_layers(self, layer_count: int) -> tuple[int, ...]:
        """The layers that come from disk: none, all but the first and the last, or all."""
        match self:
            case Residency.RESIDENT:
                return ()
            case Residency.PARTLY:
                return tuple(range(1, layer_count - 1))
            case Residency.STREAMED:
                return tuple(range(layer_count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way of running one family. `extra` are the passes that act besides those of the other axes."""

    family: str
    extra: tuple[PassId, ...] = ()
    kv: KVCacheStrategy
    residency: Residency
    batch: int

    def __str__(self) -> str:
        return "-".join([self.family, *self.extra, self.kv, self.residency, str(self.batch)])

    def values(self) -> tuple[object, ...]:
        """Its place on each axis."""
        return self.family, self.extra, self.kv, self.residency, self.batch

    @property
    def acting(self) -> tuple[PassId, ...]:
        """The passes that must take effect."""
        acts = {
            PassId.DISK_CACHE: self.kv is KVCacheStrategy.PAGED,
            PassId.CPU_OFFLOAD: self.residency is not Residency.RESIDENT,
        }
        return (*(pass_id for pass_id, does in acts.items() if does), *self.extra)

    @property
    def config(self) -> RuntimeConfig:
        """What a user would ask for to get this."""
        options = {name: value for pass_id in self.extra for name, value in EXACT_PASSES[pass_id].options.items()}
        return RuntimeConfig(kv_cache_strategy=self.kv, **options)


def extras_of(family: str) -> list[tuple[PassId, ...]]:
    """No other pass, each of the family's own, and all of them at once."""
    own = tuple(pass_id for pass_id, exact in EXACT_PASSES.items() if family in exact.families)
    return [(), *((pass_id,) for pass_id in own), *([own] if len(own) > 1 else [])]


def kv_of(family: str) -> tuple[KVCacheStrategy, ...]:
    """Where a family's cache may live; rows that cannot run in packs keep theirs in memory."""
    _architecture, config = families.FAMILIES[family]()
    in_packs = runs_in_packs(config.model_type, BackendId.OPTIMIZED_NATIVE)
    return (KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED) if in_packs else (KVCacheStrategy.RESIDENT,)


def all_cells() -> list[Cell]:
    """The whole grid, each family's cells together, and within it those with the same layers on disk: a model stays warm."""
    return [
        Cell(family=family, extra=extra, kv=kv, residency=residency, batch=batch)
        for family in FAMILIES
        for residency, extra, kv, batch in product(Residency, extras_of(family), kv_of(family), BATCHES)
        if residency is not Residency.RESIDENT or not any(EXACT_PASSES[pass_id].needs_disk_layers for pass_id in extra)
    ]


def covering_cells() -> list[Cell]:
    """Some of them, in which every two values meet that meet anywhere in the grid."""
    by_values = {cell.values(): cell for cell in all_cells()}
    return [by_values[values] for values in pairwise_cover(list(by_values))]
