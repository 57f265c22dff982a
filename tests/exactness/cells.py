"""What is one cell of the exactness grid, and which cells are there? Each is one way of running one family.

The promise: in float32 every cell gives the greedy tokens that plain transformers' `generate` gives for each prompt alone. The
axes are families × exact passes × KV {resident, paged} × placement {streamed, partly resident, resident} × batch {1, 3, 8}.
`make exactness` runs all cells; `make test` runs a pairwise cover of them: every two values of two axes that can meet do meet in
one of its cells. To add a pass, write a line in `EXACT_PASSES` and name it with its families in `families.py`.

Two exact passes act through an axis of their own: `disk-cache` wherever KV is paged, `cpu-offload` wherever layers are streamed.
`quantized-cold-tier` and `sliding-window-ring-buffer` are not exact, and not here: tests/runner/test_kv_quantized.py and
test_kv_ring.py hold what they promise instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from types import MappingProxyType
from typing import Any

from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.plan import PassId
from tests.exactness.cover import pairwise_cover
from tests.exactness.families import FAMILIES

KV = (KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED)
BATCHES = (1, 3, 8)

# The passes that have no axis of their own, with the options that make them act on prompts as short as the grid's.
EXACT_PASSES: Mapping[PassId, Mapping[str, Any]] = MappingProxyType(
    {PassId.MLP_CHUNKING: MappingProxyType({"dense_projection_chunk_rows": 7})}
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
    """One way of running one family. `exact_pass` is None where only the passes of the other axes act."""

    family: str
    exact_pass: PassId | None
    kv: KVCacheStrategy
    residency: Residency
    batch: int

    def __str__(self) -> str:
        return "-".join(str(value) for value in self.values() if value is not None)

    def values(self) -> tuple[object, ...]:
        """Its place on each axis."""
        return self.family, self.exact_pass, self.kv, self.residency, self.batch

    @property
    def acting(self) -> tuple[PassId, ...]:
        """The passes that must take effect."""
        acts = {
            PassId.DISK_CACHE: self.kv is KVCacheStrategy.PAGED,
            PassId.CPU_OFFLOAD: self.residency is not Residency.RESIDENT,
        }
        return (*(pass_id for pass_id, does in acts.items() if does), *([self.exact_pass] if self.exact_pass else []))

    @property
    def config(self) -> RuntimeConfig:
        """What a user would ask for to get this."""
        return RuntimeConfig(kv_cache_strategy=self.kv, **(EXACT_PASSES[self.exact_pass] if self.exact_pass else {}))


def all_cells() -> list[Cell]:
    """The whole grid, each family's cells together, and within it those with the same layers on disk: a model stays warm."""
    return [
        Cell(family=family, exact_pass=exact_pass, kv=kv, residency=residency, batch=batch)
        for family, own in FAMILIES.items()
        for residency, exact_pass, kv, batch in product(Residency, (None, *EXACT_PASSES), KV, BATCHES)
        if exact_pass is None or exact_pass in own
    ]


def covering_cells() -> list[Cell]:
    """Some of them, in which every two values meet that meet anywhere in the grid."""
    by_values = {cell.values(): cell for cell in all_cells()}
    return [by_values[values] for values in pairwise_cover(list(by_values))]
