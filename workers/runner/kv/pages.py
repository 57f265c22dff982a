"""How do one layer's keys and values lie in a file, and how do they come back?

`layer-NNN.pages` holds pages one after another, each the encoded bytes of its keys and then of its values, contiguous, in the
machine's byte order. `layer-NNN.jsonl` is its manifest: a line that says what the file is, then a line a page. Files live as long
as one micro-batch, so they hold neither prompts nor tokens nor checksums. No pickle.

B rows, H key heads, N tokens of a page, T tokens so far, D head width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from workers.runner.kv.files import LayerFile
from workers.runner.kv.traffic import Traffic
from workers.runner.raw import bytes_of, memory_of

SCHEMA_VERSION = 1


class Encoding(Protocol):
    """What of a tensor is written, and how that becomes a tensor again. Every part's first dimension is the rows."""

    format: str

    def encode(self, states_BHND: Tensor) -> tuple[Tensor, ...]:
        """The parts that are written, one after another."""

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """States [B, H, N, D] of that dtype."""


class Raw:
    """The very bits."""

    format = "ollm-kv-paged"

    def encode(self, states_BHND: Tensor) -> tuple[Tensor, ...]:
        """The states."""
        return (states_BHND,)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The states."""
        (states_BHND,) = parts
        assert states_BHND.dtype == dtype
        return states_BHND


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    """Where one page lies. `tokens` may be fewer than were written; `rows` picks those still running, None: all."""

    first_token: int
    tokens: int
    offset: int
    keys: tuple[_Part, ...]
    values: tuple[_Part, ...]
    rows: Tensor | None = None


class PageFile:
    """The pages of one layer, for one micro-batch."""

    def __init__(self, folder: Path, layer: int, traffic: Traffic, encoding: Encoding, reserved_bytes: int = 0) -> None:
        """Raises OSError where the files cannot be made."""
        self._file = LayerFile(folder, layer, "pages", reserved_bytes)
        self._layer = layer
        self._traffic = traffic
        self._encoding = encoding
        self._pages: list[_Page] = []
        self._end = 0
        self._dtype: torch.dtype | None = None

    @property
    def tokens(self) -> int:
        """How many tokens lie in the file."""
        return sum(page.tokens for page in self._pages)

    def append(self, keys_BHND: Tensor, values_BHND: Tensor) -> None:
        """Write a page. Raises OSError, for one when the disk is full; ValueError when the dtype changes."""
        if self._dtype is None:
            self._dtype = keys_BHND.dtype
            name = str(self._dtype).split(".")[-1]
            self._file.note(format=self._encoding.format, schema_version=SCHEMA_VERSION, layer=self._layer, dtype=name)
        if keys_BHND.dtype != self._dtype or values_BHND.dtype != self._dtype:
            raise ValueError(f"a layer's pages are all {self._dtype}")
        offset = self._end
        page = _Page(
            first_token=self.tokens,
            tokens=keys_BHND.shape[-2],
            offset=offset,
            keys=self._write(keys_BHND),
            values=self._write(values_BHND),
        )
        self._file.note(
            tokens=[page.first_token, page.first_token + page.tokens],
            offset=offset,
            key={"shape": tuple(keys_BHND.shape), "bytes": _size(page.keys)},
            value={"shape": tuple(values_BHND.shape), "bytes": _size(page.values)},
        )
        self._pages.append(page)
        self._traffic.bytes_written += self._end - offset
        self._traffic.bytes_before_encoding += keys_BHND.nbytes + values_BHND.nbytes
        self._traffic.pages_written += 1

    def read(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
        """Fill in all pages' tokens, oldest first, of the rows still running. Raises OSError when the file is too short."""
        for page in self._pages:
            span = slice(page.first_token, page.first_token + page.tokens)
            keys_BHTD[..., span, :] = self._states(page, page.keys, page.offset, keys_BHTD.device)
            values_BHTD[..., span, :] = self._states(page, page.values, page.offset + _size(page.keys), values_BHTD.device)

    def select_rows(self, rows_B: Tensor) -> None:
        """From now on read these rows, in this order, even one several times; they count among those that were read so far."""
        rows = rows_B.cpu()
        self._pages = [replace(page, rows=rows if page.rows is None else page.rows[rows]) for page in self._pages]

    def crop(self, tokens: int) -> None:
        """Forget so many of the newest tokens. Raises OSError."""
        while tokens:
            page = self._pages.pop()
            if page.tokens > tokens:
                self._pages.append(replace(page, tokens=page.tokens - tokens))
                break
            tokens -= page.tokens
            self._end = page.offset
        self._file.note(tokens_left=self.tokens)

    def close(self) -> None:
        """Close the files."""
        self._file.close()

    def _write(self, states_BHND: Tensor) -> tuple[_Part, ...]:
        written = []
        for part in self._encoding.encode(states_BHND):
            self._end = self._file.write(bytes_of(part), self._end)
            written.append(_Part(dtype=part.dtype, shape=tuple(part.shape), size=part.nbytes))
        return tuple(written)

    def _states(self, page: _Page, parts: Iterable[_Part], offset: int, device: torch.device) -> Tensor:
        """Keys or values [B, H, N, D] of one page."""
        assert self._dtype is not None
        read = []
        for part in parts:
            tensor = torch.empty(part.shape, dtype=part.dtype)
            self._file.read(memory_of(tensor.view(-1).view(torch.uint8)), offset)
            offset += part.size
            self._traffic.bytes_read += part.size
            read.append((tensor if page.rows is None else tensor[page.rows]).to(device))
        return self._encoding.decode(read, self._dtype)[..., : page.tokens, :]


def _size(parts: Iterable[_Part]) -> int:
    return sum(part.size for part in parts)
