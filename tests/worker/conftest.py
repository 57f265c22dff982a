"""What do the worker's tests share?"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A fresh place on SQLite."""
    made = Place(tmp_path, f"sqlite:///{tmp_path}/ollm.db")
    yield made
    made.close()
