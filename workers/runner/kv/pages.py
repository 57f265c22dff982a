"""How do one layer's keys and values lie in a file, and how do they come back?

`layer-NNN.pages` has places of one size, each for a page: the encoded bytes of the keys of some tokens of one sequence and then
of their values, contiguous, in the machine's byte order. A page that is given back leaves its place to another.
`layer-NNN.jsonl` is the manifest: a line that says what the file is, then a line for each page that was written, in that order.
Files live as long as one attempt's rows, so they hold neither prompts nor tokens nor checksums. No pickle.

H key heads, N tokens of a page, D head width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from workers.runner.kv.files import LayerFile
from workers.runner.kv.traffic import Traffic
from workers.runner.raw import bytes_of, memory_of

SCHEMA_VERSION = 2


class Encoding(Protocol):
    """What of a tensor is written, and how that becomes a tensor again."""

    format: str

    def encode(self, states_HND: Tensor) -> tuple[Tensor, ...]:
        """The parts that are written, one after another."""

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """States [H, N, D] of that dtype."""


class Raw:
    """The very bits."""

    format = "ollm-kv-paged"

    def encode(self, states_HND: Tensor) -> tuple[Tensor, ...]:
        """The states."""
        return (states_HND,)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The states."""
        (states_HND,) = parts
        assert states_HND.dtype == dtype
        return states_HND


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Where one page lies, and of what its keys and values consist there."""

    offset: int
    tokens: int
    keys: tuple[_Part, ...]
    values: tuple[_Part, ...]


class PageFile:
    """The pages of one layer."""

    def __init__(self, folder: Path, layer: int, traffic: Traffic, encoding: Encoding, reserved_bytes: int = 0) -> None:
        """Raises OSError where the files cannot be made."""
        self._file = LayerFile(folder, layer, "pages", reserved_bytes)
        self._layer = layer
        self._traffic = traffic
        self._encoding = encoding
        self._end = 0
        self._given_back: list[int] = []
        self._dtype: torch.dtype | None = None

    def write(self, keys_HND: Tensor, values_HND: Tensor, most_tokens: int) -> Page:
        """Write a page, in a place for one of `most_tokens` tokens, which is the same for all.

        Raises OSError, for one when the disk is full; ValueError when the dtype changes.
        """
        if self._dtype is None:
            self._dtype = keys_HND.dtype
            name = str(self._dtype).split(".")[-1]
            self._file.note(format=self._encoding.format, schema_version=SCHEMA_VERSION, layer=self._layer, dtype=name)
        if keys_HND.dtype != self._dtype or values_HND.dtype != self._dtype:
            raise ValueError(f"a layer's pages are all {self._dtype}")
        offset = self._given_back.pop() if self._given_back else self._end
        keys, middle = self._put(keys_HND, offset)
        values, end = self._put(values_HND, middle)
        if offset == self._end:
            self._end += (end - offset) // keys_HND.shape[-2] * most_tokens
        page = Page(offset=offset, tokens=keys_HND.shape[-2], keys=keys, values=values)
        self._file.note(
            tokens=page.tokens,
            offset=offset,
            key={"shape": tuple(keys_HND.shape), "bytes": middle - offset},
            value={"shape": tuple(values_HND.shape), "bytes": end - middle},
        )
        self._traffic.bytes_written += end - offset
        self._traffic.bytes_before_encoding += keys_HND.nbytes + values_HND.nbytes
        self._traffic.pages_written += 1
        return page

    def read(self, page: Page, keys_HND: Tensor, values_HND: Tensor) -> None:
        """Fill in a page's tokens. Raises OSError when the file is too short."""
        keys_HND.copy_(self._get(page.keys, page.offset))
        values_HND.copy_(self._get(page.values, page.offset + sum(part.size for part in page.keys)))

    def give_back(self, page: Page) -> None:
        """Leave the page's place to another."""
        self._given_back.append(page.offset)

    def close(self) -> None:
        """Close the files."""
        self._file.close()

    def _put(self, states_HND: Tensor, offset: int) -> tuple[tuple[_Part, ...], int]:
        written = []
        for part in self._encoding.encode(states_HND):
            offset = self._file.write(bytes_of(part), offset)
            written.append(_Part(dtype=part.dtype, shape=tuple(part.shape), size=part.nbytes))
        return tuple(written), offset

    def _get(self, parts: Iterable[_Part], offset: int) -> Tensor:
        """Keys or values [H, N, D] of one page."""
        assert self._dtype is not None
        read = []
        for part in parts:
            tensor = torch.empty(part.shape, dtype=part.dtype)
            self._file.read(memory_of(tensor.view(-1).view(torch.uint8)), offset)
            offset += part.size
            self._traffic.bytes_read += part.size
            read.append(tensor)
        return self._encoding.decode(read, self._dtype)
