"""What do the grid's tests share? The models, and an engine that stays warm, as one runner serves many plans."""

import pytest
import torch

from tests.exactness.shelf import Shelf
from workers.runner.engine import Engine

# The models are so small that a second thread costs more than it gives.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Small models of all families."""
    return Shelf(tmp_path_factory.mktemp("exactness"))


@pytest.fixture(scope="session")
def engine() -> Engine:
    """One engine for many cells."""
    return Engine()
