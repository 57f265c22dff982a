"""Does a pairwise cover hold every pair, with few combinations?"""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from tests.exactness.cells import all_cells, covering_cells
from tests.exactness.cover import pairs_of, pairwise_cover

Combination = tuple[int, ...]


@st.composite
def listed_combinations(draw: st.DrawFn) -> list[Combination]:
    """Some of all combinations of a few axes, so that many pairs cannot meet."""
    axes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    everything: list[Combination] = list(product(*(range(size) for size in axes)))
    return draw(st.lists(st.sampled_from(everything), unique=True))


@given(listed_combinations())
def test_every_pair_is_covered(combinations: list[Combination]) -> None:
    """Whatever pair stands in any combination stands in one of the cover, which holds listed combinations alone, each once."""
    cover = pairwise_cover(combinations)
    assert set(cover) <= set(combinations)
    assert len(cover) == len(set(cover))
    assert set().union(*map(pairs_of, cover)) == set().union(*map(pairs_of, combinations))


@given(listed_combinations())
def test_the_cover_is_always_the_same(combinations: list[Combination]) -> None:
    """Equal combinations give an equal cover, so that every process runs the same tests."""
    assert pairwise_cover(combinations) == pairwise_cover(list(combinations))


def test_the_cover_is_small() -> None:
    """Of three axes with three values each, 27 combinations, the nine that are needed at least are nearly enough."""
    assert 9 <= len(pairwise_cover(list(product(range(3), repeat=3)))) <= 11


def test_the_grid_is_covered_by_few_of_its_cells() -> None:
    """A quarter of the grid's cells hold every pair of its values."""
    covering = covering_cells()
    grid = {pair for cell in all_cells() for pair in pairs_of(cell.values())}
    assert {pair for cell in covering for pair in pairs_of(cell.values())} == grid
    assert len(covering) <= len(all_cells()) / 4
