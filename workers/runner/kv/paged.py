"""How does a KV cache live in files instead of memory?

Rules: after the prompt's forward pass all its keys and values are on disk; the tokens generated since are a tail in memory,
written as soon as it fills a page. What is written is released. Attention needs a layer's whole history, so it is read back for
the time of that layer's attention: the memory bound is one layer's history, not all of them.

B rows, H key heads, T tokens, D head width; keys and values are [B, H, T, D].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from workers.runner.kv.pages import PAGE_TOKENS, PageFile, Traffic

_MOST_TAIL_BYTES = 8 * 1024**2


class PagedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers does not annotate it
    """One layer's cache: pages in a file and a tail of less than a page in memory."""

    def __init__(self, pages: PageFile) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers does not annotate it
        self._pages = pages
        self._tail: tuple[list[Tensor], list[Tensor]] = ([], [])

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens; returns the whole history. Raises OSError when the disk fails."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._pages.read(key_states.device)
        tail_keys, tail_values = self._tail
        history = torch.cat([*keys, *tail_keys, key_states], dim=-2), torch.cat([*values, *tail_values, value_states], dim=-2)
        # The new states may be views of the layer's large intermediates; the tail keeps copies of its own.
        tail_keys.append(key_states.clone())
        tail_values.append(value_states.clone())
        is_prompt = key_states.shape[-2] > 1
        if is_prompt or self._tail_tokens() >= PAGE_TOKENS or self._tail_bytes() >= _MOST_TAIL_BYTES:
            self._spill()
        return history

    def get_seq_length(self) -> int:
        """Tokens on disk and in memory."""
        return self._pages.tokens + self._tail_tokens()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._pages.keep_rows(indices)
        self._tail = ([part[indices] for part in self._tail[0]], [part[indices] for part in self._tail[1]])

    def _tail_tokens(self) -> int:
        return sum(part.shape[-2] for part in self._tail[0])

    def _tail_bytes(self) -> int:
        return sum(part.nbytes for parts in self._tail for part in parts)

    def _spill(self) -> None:
        keys, values = torch.cat(self._tail[0], dim=-2), torch.cat(self._tail[1], dim=-2)
        for start in range(0, keys.shape[-2], PAGE_TOKENS):
            end = start + PAGE_TOKENS
            self._pages.append(keys[..., start:end, :], values[..., start:end, :])
        self._tail = ([], [])


def can_be_paged(module: PreTrainedModel) -> bool:
    """Whether the model has layers that keep their full history."""
    return any(type(layer) is DynamicLayer for layer in DynamicCache(config=module.config).layers)


@contextmanager
def paged_cache(module: PreTrainedModel, folder: Path, traffic: Traffic) -> Iterator[Cache]:
    """The cache of one micro-batch in `folder`: layers with a full history in files, bounded ones (sliding windows) in memory."""
    files: list[PageFile] = []
    layers = DynamicCache(config=module.config).layers
    try:
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                files.append(PageFile(folder, index, traffic))
                layers[index] = PagedLayer(files[-1])
        yield Cache(layers=layers)
    finally:
        for file in files:
            file.close()
