"""paged: how does a KV cache live in files instead of memory?

Rules: after the prompt's forward pass all its keys and values are on disk; the tokens generated since are a tail in memory,
written as soon as it fills a page. What is written is released. Attention needs a layer's whole history, so it is read back for
the time of that layer's attention: the memory bound is one layer's history, not all of them.

B rows, H key heads, L new tokens, T tokens so far, D head width; keys and values are [B, H, T, D].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ollm_service.core.estimates import MOST_TAIL_BYTES, PAGE_TOKENS
from ollm_service.core.profile import ModelProfile
from workers.runner.kv.layer import FileLayer
from workers.runner.kv.pages import Encoding, PageFile, Raw
from workers.runner.kv.traffic import Traffic


class Paged:
    """The strategy: every bit is kept, so that tokens stay those of a resident cache."""

    encoding: Encoding = Raw()

    def most_file_bytes(self, profile: ModelProfile, rows: int, tokens: int) -> int:
        """All of them."""
        return rows * tokens * profile.kv_bytes_per_token

    def layer(self, folder: Path, index: int, traffic: Traffic, reserved_bytes: int) -> "PagedLayer":
        """A layer whose pages are files in `folder`. Raises OSError."""
        return PagedLayer(PageFile(folder, index, traffic, self.encoding, reserved_bytes))

    def evidence(self, traffic: Traffic) -> str:
        """Bytes and pages."""
        return f"{traffic.bytes_written:,} bytes written in {traffic.pages_written:,} pages"

    def measured(self, traffic: Traffic) -> Mapping[str, float]:
        """The pages."""
        return {"kv_pages_written": float(traffic.pages_written)}


class PagedLayer(FileLayer):  # type: ignore[no-untyped-call]  # transformers does not annotate it
    """One layer's cache: pages in a file and a tail of less than a page in memory.

    The tail has room for all of its tokens from the first on. As small tensors of their own, made in every step between the large
    ones that come and go, they would pin the heap's holes, each too small for the next step's history: after 128 tokens a model
    of 400 MiB held 300 more.
    """

    def __init__(self, pages: PageFile) -> None:
        super().__init__()
        self._pages = pages
        self._room: tuple[Tensor, Tensor] | None = None
        self._tail_tokens = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens; returns the whole history. Raises OSError when the disk fails."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.get_seq_length() == 0:
            self._write(key_states, value_states)
            return key_states, value_states
        if self._room is None:
            self._room = _rooms(key_states, value_states)
        history = self._history(key_states, value_states)
        new, most = key_states.shape[-2], self._room[0].shape[-2]
        if self._tail_tokens + new > most:
            self._spill()
        if new > most:
            self._write(key_states, value_states)
            return history
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., self._tail_tokens : self._tail_tokens + new, :] = states
        self._tail_tokens += new
        if self._tail_tokens == most:
            self._spill()
        return history

    def get_seq_length(self) -> int:
        """Tokens on disk and in memory."""
        return self._pages.tokens + self._tail_tokens

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order."""
        self._pages.select_rows(rows_B)
        if self._room is not None:
            self._room = self._room[0][rows_B], self._room[1][rows_B]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -`tokens_to_remove` tokens: as in transformers the number is negative. Raises OSError."""
        of_tail = min(-tokens_to_remove, self._tail_tokens)
        self._tail_tokens -= of_tail
        if -tokens_to_remove > of_tail:
            self._pages.crop(-tokens_to_remove - of_tail)

    def close(self) -> None:
        """Close the files."""
        self._pages.close()

    def _history(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """Everything so far and the new tokens, each in one piece: nothing else of it is in memory but a page at a time."""
        tokens = self.get_seq_length() + new_keys.shape[-2]
        keys = new_keys.new_empty((*new_keys.shape[:2], tokens, new_keys.shape[-1]))
        values = new_values.new_empty((*new_values.shape[:2], tokens, new_values.shape[-1]))
        self._pages.read(keys, values)
        start = self._pages.tokens
        for part_keys, part_values in (self._tail(), (new_keys, new_values)):
            end = start + part_keys.shape[-2]
            keys[..., start:end, :], values[..., start:end, :] = part_keys, part_values
            start = end
        return keys, values

    def _tail(self) -> tuple[Tensor, Tensor]:
        assert self._room is not None
        return self._room[0][..., : self._tail_tokens, :], self._room[1][..., : self._tail_tokens, :]

    def _spill(self) -> None:
        if self._tail_tokens:
            self._write(*self._tail())
            self._tail_tokens = 0

    def _write(self, keys: Tensor, values: Tensor) -> None:
        for start in range(0, keys.shape[-2], PAGE_TOKENS):
            end = start + PAGE_TOKENS
            self._pages.append(keys[..., start:end, :], values[..., start:end, :])


def _rooms(keys_BHLD: Tensor, values_BHLD: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the tail: a page, or as much of one as `MOST_TAIL_BYTES` allows."""
    a_token = (keys_BHLD.nbytes + values_BHLD.nbytes) // keys_BHLD.shape[-2]
    tokens = max(1, min(PAGE_TOKENS, MOST_TAIL_BYTES // a_token))
    keys, values = (states.new_empty((*states.shape[:-2], tokens, states.shape[-1])) for states in (keys_BHLD, values_BHLD))
    return keys, values
