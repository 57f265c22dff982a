"""sliding-window-ring-buffer: how does a KV cache stay as small as a window of the newest tokens?

Rules: the prompt's forward pass sees all of the prompt, for its keys and values are in memory then anyway; of these the newest N
are kept. From then on a new token attends to exactly the N newest, itself among them; older ones are evicted and counted. Layers
that the model itself bounds keep their own window. Answers are those of a full history as long as a row has at most N tokens,
whatever padding is in front of it; then they differ, so the strategy is inexact by definition. A forward pass of several tokens
after the prompt's shows each of them all N - 1 that came before the first.

`layer-NNN.ring` has N slots, and token t, counted from the first column, padding included, lies in slot t mod N: its keys
[B, H, D], then its values, in the machine's byte order. `layer-NNN.jsonl` says so, anew whenever rows leave: then what is kept is
written again for those that stay.

B rows, H key heads, L new tokens, N tokens of the window, D head width.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollm_service.core.profile import ModelProfile
from workers.runner.kv.files import LayerFile
from workers.runner.kv.layer import FileLayer
from workers.runner.kv.traffic import Traffic
from workers.runner.raw import bytes_of, memory_of

FORMAT = "ollm-kv-ring"
SCHEMA_VERSION = 1


class SlidingWindowRingBuffer:
    """The strategy, with a window of so many tokens."""

    def __init__(self, window_tokens: int) -> None:
        self._window_tokens = window_tokens

    def most_file_bytes(self, profile: ModelProfile, rows: int, tokens: int) -> int:
        """At most the window."""
        return rows * min(tokens, self._window_tokens) * profile.kv_bytes_per_token

    def layer(self, folder: Path, index: int, traffic: Traffic, reserved_bytes: int) -> "RingLayer":
        """A layer whose ring is a file in `folder`. Raises OSError."""
        return RingLayer(RingFile(folder, index, traffic, self._window_tokens, reserved_bytes))

    def evidence(self, traffic: Traffic) -> str:
        """Bytes, and what was evicted."""
        window = f"the newest {self._window_tokens:,} tokens kept, {traffic.tokens_evicted:,} evicted in all layers"
        return f"{traffic.bytes_written:,} bytes written; {window}"

    def measured(self, traffic: Traffic) -> Mapping[str, float]:
        """What was evicted."""
        return {"kv_tokens_evicted": float(traffic.tokens_evicted)}


class RingFile:
    """The newest tokens of one layer, for one micro-batch. `seen` is how many there were at all."""

    def __init__(self, folder: Path, layer: int, traffic: Traffic, slots: int, reserved_bytes: int = 0) -> None:
        """Raises OSError where the files cannot be made."""
        self._file = LayerFile(folder, layer, "ring", reserved_bytes)
        self._layer = layer
        self._traffic = traffic
        self.slots = slots
        self.seen = 0

    @property
    def kept(self) -> int:
        """How many tokens are in the file."""
        return min(self.seen, self.slots)

    def append(self, keys_BHLD: Tensor, values_BHLD: Tensor) -> None:
        """Add new tokens and evict those that are too old. Raises OSError."""
        rows, new, before = keys_BHLD.shape[0], keys_BHLD.shape[-2], self.kept
        if self.seen == 0:
            self._note(keys_BHLD, values_BHLD)
        self.seen += new
        self._write(keys_BHLD[..., -self.slots :, :], values_BHLD[..., -self.slots :, :])
        self._traffic.tokens_evicted += rows * (before + new - self.kept)

    def read(self, keys_BHND: Tensor, values_BHND: Tensor) -> None:
        """Fill in the newest tokens, as many as there is room for, oldest first. Raises OSError."""
        tokens, key_bytes = keys_BHND.shape[-2], _slot_bytes(keys_BHND)
        slots = torch.empty((tokens, key_bytes + _slot_bytes(values_BHND)), dtype=torch.uint8)
        for start, end, slot in self._runs(self.seen - tokens, self.seen):
            self._file.read(memory_of(slots[start:end].view(-1)), slot * slots.shape[1])
        self._traffic.bytes_read += slots.nbytes
        for states, data in ((keys_BHND, slots[:, :key_bytes]), (values_BHND, slots[:, key_bytes:])):
            rows, heads, _, width = states.shape
            states.copy_(data.view(states.dtype).view(tokens, rows, heads, width).permute(1, 2, 0, 3))

    def write_again(self, keys_BHND: Tensor, values_BHND: Tensor) -> None:
        """Have these states of the tokens that are kept: of other rows than before. Raises OSError."""
        self._note(keys_BHND, values_BHND)
        self._write(keys_BHND, values_BHND)

    def forget_newest(self, tokens: int) -> None:
        """Raises ValueError where that would bring back what was evicted."""
        if self.seen > self.slots:
            raise ValueError("tokens that have left the window cannot come back")
        self.seen -= tokens

    def close(self) -> None:
        """Close the files."""
        self._file.close()

    def _write(self, keys_BHND: Tensor, values_BHND: Tensor) -> None:
        """These are the newest tokens, at most as many as there are slots."""
        parts = [states.detach().cpu().permute(2, 0, 1, 3).flatten(1).contiguous() for states in (keys_BHND, values_BHND)]
        slots = torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
        for start, end, slot in self._runs(self.seen - len(slots), self.seen):
            self._file.write(bytes_of(slots[start:end]), slot * slots.shape[1])
        self._traffic.bytes_written += slots.nbytes

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Where these tokens lie: from and to which of them, and the slot of the first; in two runs where the ring closes."""
        done, tokens = 0, last - first
        while done < tokens:
            slot = (first + done) % self.slots
            end = min(tokens, done + self.slots - slot)
            yield done, end, slot
            done = end

    def _note(self, keys_BHND: Tensor, values_BHND: Tensor) -> None:
        self._file.note(
            format=FORMAT,
            schema_version=SCHEMA_VERSION,
            layer=self._layer,
            dtype=str(keys_BHND.dtype).split(".")[-1],
            window_tokens=self.slots,
            key={"shape": (*keys_BHND.shape[:2], keys_BHND.shape[-1]), "bytes": _slot_bytes(keys_BHND)},
            value={"shape": (*values_BHND.shape[:2], values_BHND.shape[-1]), "bytes": _slot_bytes(values_BHND)},
        )


class RingLayer(FileLayer):  # type: ignore[no-untyped-call]  # transformers does not annotate it
    """One layer's cache: nothing of it is in memory between two forward passes."""

    def __init__(self, ring: RingFile) -> None:
        super().__init__()
        self._ring = ring

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens; returns what they may attend to: themselves and those kept before them. Raises OSError."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._like = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        window, old = (key_states, value_states), self._visible
        if old:
            window = self._newest(old, room=key_states.shape[-2])
            window[0][..., old:, :], window[1][..., old:, :] = key_states, value_states
        self._ring.append(key_states, value_states)
        return window

    def get_seq_length(self) -> int:
        """All tokens that there were: positions go on."""
        return self._ring.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the new ones may attend to, themselves included, and how many of the oldest are hidden."""
        return self._visible + query_length, self._ring.seen - self._visible

    def select_rows(self, rows_B: Tensor) -> None:
        """Write the window again for these rows, in this order. Raises OSError."""
        keys, values = self._newest(self._ring.kept)
        self._like = self._like[0][rows_B], self._like[1][rows_B]
        self._ring.write_again(keys[rows_B], values[rows_B])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -`tokens_to_remove` tokens: as in transformers the number is negative.

        Raises ValueError once tokens were evicted.
        """
        if tokens_to_remove:
            self._ring.forget_newest(-tokens_to_remove)

    def close(self) -> None:
        """Close the files."""
        self._ring.close()

    @property
    def _visible(self) -> int:
        """How many of the tokens that are kept the next one attends to."""
        return min(self._ring.seen, self._ring.slots - 1)

    def _newest(self, tokens: int, room: int = 0) -> tuple[Tensor, Tensor]:
        """The newest tokens that are kept, with room for so many new ones behind them."""
        like_keys, like_values = self._like
        keys = like_keys.new_empty((*like_keys.shape[:2], tokens + room, like_keys.shape[-1]))
        values = like_values.new_empty((*like_values.shape[:2], tokens + room, like_values.shape[-1]))
        self._ring.read(keys[..., :tokens, :], values[..., :tokens, :])
        return keys, values


def _slot_bytes(states_BHND: Tensor) -> int:
    """What one token of all rows takes."""
    rows, heads, _, width = states_BHND.shape
    return rows * heads * width * states_BHND.element_size()
