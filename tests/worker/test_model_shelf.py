"""Does a worker offer the models that it has, as they are now?"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ollm_service.inspection import DigestCache
from tests.unit.model_folders import TINY_LLAMA, make_model
from tests.waiting import wait_for
from workers.model_shelf import ModelShelf

SECONDS = 10.0


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[ModelShelf]:
    """A shelf that looks all the time."""
    made = ModelShelf(tmp_path / "models", DigestCache(), rescan_seconds=0.05)
    yield made
    made.stop()


def names(shelf: ModelShelf) -> list[str]:
    """The names of the models on offer."""
    return [model.name for model in shelf.models]


def test_a_root_that_is_not_there_yet_is_empty(shelf: ModelShelf, tmp_path: Path) -> None:
    """It is no error, and models that appear are found."""
    shelf.start()
    assert shelf.wait_for_first_scan(SECONDS)
    assert names(shelf) == []
    make_model(tmp_path / "models" / "later")
    wait_for(lambda: names(shelf) == ["later"], timeout=SECONDS, what="the model")


def test_a_model_that_changes_gets_another_digest(shelf: ModelShelf, tmp_path: Path) -> None:
    """A rewritten configuration makes another model of it; a deleted folder is no longer offered."""
    make_model(tmp_path / "models" / "one")
    two = make_model(tmp_path / "models" / "two")
    shelf.start()
    wait_for(lambda: names(shelf) == ["one", "two"], timeout=SECONDS, what="both models")
    before = {model.name: model.digest for model in shelf.models}
    for file in two.iterdir():
        file.unlink()
    two.rmdir()
    wait_for(lambda: names(shelf) == ["one"], timeout=SECONDS, what="one model")
    make_model(tmp_path / "models" / "two", {**TINY_LLAMA, "max_position_embeddings": 256})
    wait_for(lambda: names(shelf) == ["one", "two"], timeout=SECONDS, what="the new one")
    after = {model.name: model.digest for model in shelf.models}
    assert after["one"] == before["one"]
    assert after["two"] != before["two"]


def test_an_unchanged_root_is_offered_without_a_break(shelf: ModelShelf, tmp_path: Path) -> None:
    """Looking again never takes a model off the shelf for a moment."""
    make_model(tmp_path / "models" / "one")
    shelf.start()
    wait_for(lambda: names(shelf) == ["one"], timeout=SECONDS, what="the model")
    seen: list[list[str]] = []
    first = shelf.models

    def looked_again() -> bool:
        seen.append(names(shelf))
        return shelf.models is not first

    wait_for(looked_again, timeout=SECONDS, what="another look")
    assert all(found == ["one"] for found in seen)


def test_stopping_ends_the_looking(shelf: ModelShelf) -> None:
    """stop() returns when the thread is gone."""
    shelf.start()
    shelf.stop()
    assert not shelf._thread.is_alive()
