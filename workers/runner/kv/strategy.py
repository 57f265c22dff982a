"""What is a KV cache strategy that keeps files, and how does it become the cache of one micro-batch?

A strategy gives each layer that would keep its full history a layer of its own. Layers that are bounded by themselves (sliding
windows, recurrent states) stay in memory as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ollm_service.core.profile import ModelProfile
from workers.runner.kv.layer import FileLayer
from workers.runner.kv.traffic import Traffic


class Strategy(Protocol):
    """Where the keys and values of past tokens live."""

    def most_file_bytes(self, profile: ModelProfile, rows: int, tokens: int) -> int:
        """What the files of `rows` rows of `tokens` tokens, padding included, take at most; 0 where the profile does not tell."""

    def layer(self, folder: Path, index: int, traffic: Traffic, reserved_bytes: int) -> FileLayer:
        """A new layer in place of layer `index`. Raises OSError."""

    def evidence(self, traffic: Traffic) -> str:
        """What it did, in words."""

    def measured(self, traffic: Traffic) -> Mapping[str, float]:
        """What it did, in numbers."""


def has_history(module: PreTrainedModel) -> bool:
    """Whether the model has layers that keep their full history."""
    return any(map(_keeps_history, DynamicCache(config=module.config).layers))


@contextmanager
def cache_in_files(
    module: PreTrainedModel, strategy: Strategy, folder: Path, traffic: Traffic, reserved_bytes: int = 0
) -> Iterator[Cache]:
    """The cache of one micro-batch in `folder`, of whose disk so many bytes are reserved. Raises OSError without room."""
    layers = DynamicCache(config=module.config).layers
    replaced = [index for index, layer in enumerate(layers) if _keeps_history(layer)]
    made: list[FileLayer] = []
    try:
        for index in replaced:
            made.append(strategy.layer(folder, index, traffic, -(-reserved_bytes // len(replaced))))
            layers[index] = made[-1]
        yield Cache(layers=layers)
    finally:
        for one in made:
            one.close()


def _keeps_history(layer: object) -> bool:
    return type(layer) is DynamicLayer
