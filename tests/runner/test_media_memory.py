"""Does the memory that images and sounds take depend on how many rows there are? It must not."""

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ollm_service.core.options import RuntimeConfig
from ollm_service.core.passes import NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute, Finished, Message, Stopped
from tests.runner.commands import chat_row, only, results_of, run
from tests.runner.media_answers import MAKERS, NEW_TOKENS, contents_of, plain
from tests.runner.planned import planned_command
from workers.runner.backends import generic
from workers.runner.backends.native import planned_passes
from workers.runner.engine import Engine
from workers.runner.media.feeding import FEATURES
from workers.runner.media.readers import open_reader
from workers.runner.model import LoadedModel
from workers.runner.passes.specialization import SpecializationPass
from workers.runner.prompts import EncodedRow, encode_row

NAMES = ("gemma3", "voxtral")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with both."""
    root = tmp_path_factory.mktemp("media")
    for name in NAMES:
        MAKERS[name](root / name)
    return root


def command_for(root: Path, name: str) -> Execute:
    """Execute each content of this model twice."""
    contents = [*contents_of(name), *contents_of(name)]
    rows = [chat_row(index, content, max_new_tokens=NEW_TOKENS) for index, content in enumerate(contents)]
    return planned_command(root / name, rows, RuntimeConfig(multimodal=True))


class Watched:
    """An engine whose model is watched: how many items its towers compute at a time.

    It may be made to lack memory for rows, or once to read images; at the `stop_at`th item it is told to stop.
    """

    def __init__(self, most_rows: int | None = None, *, lacks_once: bool = False, stop_at: int | None = None) -> None:
        self.items: list[int] = []
        self.stop = threading.Event()
        self._most_rows = most_rows
        self._lacks_once = lacks_once
        self._stop_at = stop_at
        self.engine = Engine(self._passes)

    def _passes(self, model: LoadedModel, command: Execute) -> list[SpecializationPass]:
        tower: Any = model.module.get_encoder(modality="image" if command.profile.family == "gemma3" else "audio")
        first = next(part for part in tower.modules() if isinstance(part, nn.Conv1d | nn.Conv2d))
        first.register_forward_pre_hook(self._count)
        model.module.register_forward_pre_hook(self._refuse, with_kwargs=True)
        return [*planned_passes(model, command), *([Cramped(model, len(command.rows))] if self._lacks_once else [])]

    def _count(self, _module: Any, arguments: Any) -> None:
        self.items.append(len(arguments[0]))
        if len(self.items) == self._stop_at:
            self.stop.set()

    def _refuse(self, _module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        if self._most_rows is not None and named["logits_to_keep"].numel() > self._most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")


class Cramped:
    """A pass that lets a processor read each row once, and then run out of memory once."""

    pass_id = PassId.MLP_CHUNKING

    def __init__(self, model: LoadedModel, rows: int) -> None:
        self._model = model
        self._left = rows

    def check(self) -> PassOutcome | None:
        """It can."""
        return None

    def apply(self) -> None:
        """Put itself between the rows and the real processor's template."""
        reader: Any = self._model.media
        self._given = reader._processor.apply_chat_template
        reader._processor.apply_chat_template = self._read

    def _read(self, *arguments: Any, **named: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise MemoryError
        return self._given(*arguments, **named)

    def evidence(self) -> PassOutcome:
        """What every pass has to show."""
        return NotNeeded(reason="a test")

    def undo(self) -> None:
        """The model's reader goes with its own pass."""

    def measured(self) -> dict[str, float]:
        """Nothing."""
        return {}


def tensors_of(shape: tuple[int, ...]) -> int:
    """How many tensors there are whose items have this shape."""
    gc.collect()
    return sum(type(found) is Tensor and tuple(found.shape[1:]) == shape for found in gc.get_objects())


@pytest.mark.parametrize("name", NAMES)
def test_no_row_keeps_what_its_image_became(root: Path, name: str) -> None:
    """Tokens are known beforehand; tensors are made when they are fed, and again if need be."""
    command = command_for(root, name)
    model = generic.load(command, lambda: None)
    reader = open_reader(root / name, model.module, model.tokenizer)
    rows = [encode_row(row, model.tokenizer, 1024, reader=reader) for row in command.rows]
    media = [row.media for row in rows if isinstance(row, EncodedRow) and row.media is not None]
    assert len(media) == 6
    (feature,) = {shape[1:] for one in media for key, shape in one.shapes if key in FEATURES}
    assert tensors_of(feature) == 0
    tensors = media[0].read()
    assert tensors_of(feature) == 1
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == dict(media[0].shapes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most_rows", [None, 3])
def test_towers_compute_one_at_a_time(root: Path, name: str, most_rows: int | None) -> None:
    """However many rows join; where memory runs out, rows are read anew. Tokens are those of plain transformers."""
    watched = Watched(most_rows)
    messages = run(watched.engine, command_for(root, name))
    contents = contents_of(name)
    alone = [plain(root, name, content) for content in contents]
    assert {row: result.text for row, result in results_of(messages).items()} == dict(enumerate([*alone, *alone]))
    assert set(watched.items) == {1}
    assert only(messages, Finished).measured["memory_halvings"] == (0 if most_rows is None else 2)


def test_a_lack_of_memory_while_images_are_read_is_no_fault_of_theirs(root: Path) -> None:
    """Rows begin anew, fewer at a time, and every one is answered."""
    watched = Watched(lacks_once=True)
    messages = run(watched.engine, command_for(root, "gemma3"))
    assert {row: result.error for row, result in results_of(messages).items() if result.error} == {}
    assert only(messages, Finished).measured["memory_halvings"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_is_heeded_inside_a_tower(root: Path, name: str) -> None:
    """Nothing of the next image or sound is computed."""
    watched, messages = Watched(stop_at=2), list[Message]()
    watched.engine.execute(command_for(root, name), messages.append, watched.stop)
    assert isinstance(messages[-1], Stopped)
    assert len(watched.items) == 2
