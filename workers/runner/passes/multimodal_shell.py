"""multimodal-shell: rows may bring images or sounds; the model's processor makes them part of the prompt's forward pass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ollm_service.core.content import media_parts
from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from workers.runner.media.feeding import placeholder_of
from workers.runner.media.readers import open_reader
from workers.runner.model import LoadedModel

_INPUTS: Mapping[str, str] = {"pixel_values": "images", "input_features": "chunks of sound"}


class MultimodalShell:
    """The pass. Evidence: the images or chunks of sound that real forward passes were fed, and the tokens that stand for them."""

    pass_id = PassId.MULTIMODAL_SHELL

    def __init__(self, model: LoadedModel, command: Execute) -> None:
        self._model = model
        self._folder = Path(command.model_dir)
        self._brings_media = any(True for row in command.rows for _ in media_parts(row.messages))
        self._hook: Any = None
        self._fed: dict[str, int] = {}
        self._placeholders = 0

    def check(self) -> PassOutcome | None:
        """Not needed where no row of the plan has an image or a sound; fails for a model that has no place for them."""
        if not self._brings_media:
            return NotNeeded(reason="no row of this plan has an image or a sound")
        if placeholder_of(self._model.module) is None:
            return Failed(reason="the model's configuration names no token for images or sounds", error_type="NoPlaceholder")
        return None

    def apply(self) -> None:
        """From now on messages are read with the processor, and what forward passes are fed is counted."""
        self._model.media = open_reader(self._folder, self._model.module, self._model.tokenizer)
        self._hook = self._model.module.register_forward_pre_hook(self._count, with_kwargs=True)

    def evidence(self) -> PassOutcome:
        """Applied with the counts; not needed as long as no row with an image or a sound has run: all may be too long."""
        if not self._fed:
            return NotNeeded(reason="no row with an image or a sound that could be read has run")
        counts = " and ".join(f"{count:,} {_INPUTS[name]}" for name, count in self._fed.items())
        return Applied(evidence=f"{counts} in the place of {self._placeholders:,} tokens")

    def undo(self) -> None:
        """The model takes text alone again."""
        self._model.media = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def measured(self) -> Mapping[str, float]:
        """What forward passes were fed."""
        return {"media_fed": float(sum(self._fed.values())), "media_tokens": float(self._placeholders)}

    def _count(self, _module: nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
        for name in _INPUTS:
            fed = named.get(name)
            if isinstance(fed, Tensor):
                self._fed[name] = self._fed.get(name, 0) + fed.shape[0]
                self._placeholders += int((named["input_ids"] == placeholder_of(self._model.module)).sum())
