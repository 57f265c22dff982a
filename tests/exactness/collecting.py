"""When does a test of the grid run, and in which process? With `make test` or `make exactness` alone, and beside its family."""

from collections.abc import Collection, Iterable

import pytest
from _pytest.mark import ParameterSet

from tests.exactness.cells import Cell

# A cell with layers of two kinds, a recurrent state, experts, and a model outside the native families.
USUAL = frozenset({"llama", "gemma3-text", "qwen3-next", "gpt-oss", "gpt2"})


def collected(values: Iterable[Cell | str], usual: Collection[Cell | str] = USUAL) -> list[ParameterSet]:
    """A parameter for each cell or family; those that are not `usual` run with the whole grid only."""
    return [
        pytest.param(value, id=str(value), marks=[*_beside_its_family(value), *([] if value in usual else [pytest.mark.grid])])
        for value in values
    ]


def _beside_its_family(value: Cell | str) -> list[pytest.MarkDecorator]:
    """One process makes a family's models and its plain answers."""
    return [pytest.mark.xdist_group(f"exactness-{value.family if isinstance(value, Cell) else value}")]
