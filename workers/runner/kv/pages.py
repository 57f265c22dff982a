"""How do one layer's keys and values lie in a file, and how do they come back?

`layer-NNN.pages` holds pages one after another, each the raw bytes of its keys and then of its values, contiguous, in the model's
dtype and the machine's byte order. `layer-NNN.jsonl` is its manifest: a line that says what the file is, then a line a page.
Files live as long as one micro-batch, so they hold neither prompts nor tokens nor checksums. No pickle.

B rows, H key heads, N tokens of a page, D head width.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.runner.raw import bytes_of, memory_of

FORMAT = "ollm-kv-paged"
SCHEMA_VERSION = 1
PAGE_TOKENS = 128
_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@dataclass(slots=True)
class Traffic:
    """What went to the disk and came back, in bytes, and the pages written."""

    bytes_written: int = 0
    bytes_read: int = 0
    pages_written: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Where one page lies. `rows` picks those of its rows that are still running; None: all."""

    first_token: int
    tokens: int
    offset: int
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    key_bytes: int
    value_bytes: int
    rows: Tensor | None = None


class PageFile:
    """The pages of one layer, for one micro-batch."""

    def __init__(self, folder: Path, layer: int, traffic: Traffic) -> None:
        """Raises OSError where the files cannot be made."""
        self._fd = os.open(folder / f"layer-{layer:03d}.pages", os.O_RDWR | _NEW_FILE, 0o600)
        self._manifest_fd = os.open(folder / f"layer-{layer:03d}.jsonl", os.O_WRONLY | _NEW_FILE, 0o600)
        self._layer = layer
        self._traffic = traffic
        self._pages: list[Page] = []
        self._end = 0
        self._manifest_end = 0
        self._dtype: torch.dtype | None = None

    @property
    def tokens(self) -> int:
        """How many tokens lie in the file."""
        return sum(page.tokens for page in self._pages)

    def append(self, keys_BHND: Tensor, values_BHND: Tensor) -> None:
        """Write a page. Raises OSError, for one when the disk is full; ValueError when the dtype changes."""
        if self._dtype is None:
            self._dtype = keys_BHND.dtype
            self._note(format=FORMAT, schema_version=SCHEMA_VERSION, layer=self._layer, dtype=str(self._dtype).split(".")[-1])
        if keys_BHND.dtype != self._dtype or values_BHND.dtype != self._dtype:
            raise ValueError(f"a layer's pages are all {self._dtype}")
        keys, values = bytes_of(keys_BHND), bytes_of(values_BHND)
        page = Page(
            first_token=self.tokens,
            tokens=keys_BHND.shape[-2],
            offset=self._end,
            key_shape=tuple(keys_BHND.shape),
            value_shape=tuple(values_BHND.shape),
            key_bytes=len(keys),
            value_bytes=len(values),
        )
        for part in (keys, values):
            self._end = _write_all(self._fd, part, self._end)
        self._note(
            tokens=[page.first_token, page.first_token + page.tokens],
            offset=page.offset,
            key={"shape": page.key_shape, "bytes": page.key_bytes},
            value={"shape": page.value_shape, "bytes": page.value_bytes},
        )
        self._pages.append(page)
        self._traffic.bytes_written += page.key_bytes + page.value_bytes
        self._traffic.pages_written += 1

    def read(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of all pages, oldest first, of the rows still running. Raises OSError when the file is too short."""
        if self._dtype is None:
            return [], []
        buffer = torch.empty(self._end, dtype=torch.uint8)
        _read_all(self._fd, memory_of(buffer))
        self._traffic.bytes_read += self._end
        keys, values = [], []
        for page in self._pages:
            middle = page.offset + page.key_bytes
            keys.append(self._tensor(buffer[page.offset : middle], page.key_shape, page.rows, device))
            values.append(self._tensor(buffer[middle : middle + page.value_bytes], page.value_shape, page.rows, device))
        return keys, values

    def keep_rows(self, kept_B: Tensor) -> None:
        """From now on read these rows only; they count among those that were read so far."""
        kept = kept_B.cpu()
        self._pages = [
            Page(
                first_token=page.first_token,
                tokens=page.tokens,
                offset=page.offset,
                key_shape=page.key_shape,
                value_shape=page.value_shape,
                key_bytes=page.key_bytes,
                value_bytes=page.value_bytes,
                rows=kept if page.rows is None else page.rows[kept],
            )
            for page in self._pages
        ]

    def close(self) -> None:
        """Close the files; deleting them is the folder's affair."""
        os.close(self._fd)
        os.close(self._manifest_fd)

    def _tensor(self, data: Tensor, shape: tuple[int, ...], rows: Tensor | None, device: torch.device) -> Tensor:
        assert self._dtype is not None
        tensor = data.view(self._dtype).view(shape)
        return (tensor if rows is None else tensor[rows]).to(device)

    def _note(self, **entry: object) -> None:
        line = memoryview(json.dumps(entry).encode() + b"\n")
        self._manifest_end = _write_all(self._manifest_fd, line, self._manifest_end)


def _write_all(fd: int, data: memoryview, offset: int) -> int:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
    return offset


def _read_all(fd: int, into: memoryview) -> None:
    offset = 0
    while offset < len(into):
        count = os.preadv(fd, [into[offset:]], offset)
        if count == 0:
            raise OSError(f"a page file ends after {offset:,} of {len(into):,} bytes")
        offset += count
