"""How do a model's weights lie on disk, so that one read brings a whole layer?

A folder holds `weights.extents`, the raw bytes, and `manifest.jsonl`: a line that says what the folder is, one for each extent,
and a last one once all are there. An extent begins at a multiple of `ALIGNMENT` and is padded to one, as direct I/O wants it; in
it tensors lie one after another as torch has them in memory, each at a multiple of `TENSOR_ALIGNMENT`, under the names that
transformers' modules give them. No pickle.

An extent is one layer without its experts, or `""` for everything that is in no layer. What is also wanted in parts is *sliced*
along the first dimension: `OWNER/N` is the N-th slice of all tensors of one owner, which is a module of experts, with one expert
a slice, or a vocabulary matrix, with a tile of rows a slice. Slices of one owner follow each other, and those of a layer's
experts follow the layer, so that a whole layer is one piece of the file.

Extents' lines are written when their bytes are on the disk. A writer that was killed goes on behind the last whole line.
"""

import contextlib
import os
import threading
import weakref
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollm_service.core.laying_out import (
    EXTENTS_DATA,
    EXTENTS_MANIFEST,
    is_last_line,
    manifest_entry,
    manifest_header,
    manifest_line,
)
from workers.runner.interruptions import AttemptEnded
from workers.runner.raw import bytes_of, memory_of, pages, write_all

ALIGNMENT, TENSOR_ALIGNMENT = 4096, 64
CHUNK_BYTES = 8 * 1024**2
DATA = EXTENTS_DATA


class CorruptExtents(Exception):
    """What lies on the disk is not what was written there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One tensor: where it begins in its extent, and what it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def of(self, extent: Tensor) -> Tensor:
        """A view of it in the extent's bytes."""
        return extent[self.offset : self.offset + self.size].view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Where a layer lies in the file; `size` is padded, `checksum` the CRC-32 of all of it.

    `first` is where a slice begins along the first dimension of its tensors; None: they are whole.
    """

    name: str
    offset: int
    size: int
    checksum: int
    spans: tuple[Span, ...]
    first: int | None = None

    @property
    def owner(self) -> str:
        """What it is a slice of; itself where it is none."""
        return self.name if self.first is None else self.name.rpartition("/")[0]

    @property
    def payload(self) -> int:
        """Bytes of its tensors, without padding."""
        return sum(span.size for span in self.spans)


def tensors_of(buffer: Tensor, extents: Sequence[Extent]) -> dict[str, Tensor]:
    """Views of all tensors of extents that lie one after another in `buffer`, by name; slices are joined again.

    Where a slice is one entry of the first dimension, padding lies between the entries, and the stride says so.
    """
    found: dict[str, Tensor] = {}
    at, position = 0, 0
    while position < len(extents):
        extent = extents[position]
        same = [other for other in extents[position:] if other.owner == extent.owner]
        for span in extent.spans:
            found[span.name] = span.of(buffer[at:]) if extent.first is None else _joined(buffer[at:], same, span)
        at += sum(other.size for other in same)
        position += len(same)
    return found


def _joined(buffer: Tensor, slices: Sequence[Extent], span: Span) -> Tensor:
    """One tensor of which every slice has a part. Raises CorruptExtents where the slices do not fit together."""
    parts = [next((part for part in one.spans if part.name == span.name), None) for one in slices]
    kinds = {(part.dtype, part.shape[1:], part.offset) for part in parts if part is not None}
    if len(kinds) != 1 or None in parts:
        raise CorruptExtents(f"the slices of `{slices[0].owner}` do not fit together")
    count = sum(part.shape[0] for part in parts if part is not None)
    whole = buffer[: buffer.numel() // ALIGNMENT * ALIGNMENT].view(getattr(torch, span.dtype))
    shape = (count, *span.shape[1:])
    strides = list(torch.empty(shape, device="meta").stride())
    if span.shape[0] == 1:
        strides[0] = slices[0].size // whole.element_size()
    return whole.as_strided(shape, strides, whole.storage_offset() + span.offset // whole.element_size())


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What extents were made of. Others are of no use: transformers may name and join weights differently in another version."""

    digest: str
    transformers: str

    def header(self) -> dict[str, Any]:
        """The manifest's first line."""
        return manifest_header(self.digest, self.transformers)


class ExtentWriter:
    """Writes extents into a folder that it owns, beginning behind those that are there already. Close it in any case."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        """What the manifest lists beyond the end of the file is to be written again. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        listed, _ = _read_manifest(folder, origin)
        self._unsettled: list[Extent] = []
        with contextlib.ExitStack() as undone:
            self._data = os.open(folder / DATA, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undone.callback(os.close, self._data)
            there = os.fstat(self._data).st_size
            self.written = {name: extent for name, extent in listed.items() if extent.offset + extent.size <= there}
            self._end = max((extent.offset + extent.size for extent in self.written.values()), default=0)
            os.ftruncate(self._data, self._end)
            # Under another name until it is whole: on a full disk the old one stays, and with it what was done.
            part = folder / f"{EXTENTS_MANIFEST}.part"
            self._manifest = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            undone.callback(os.close, self._manifest)
            undone.callback(part.unlink, missing_ok=True)
            self._note(origin.header(), *map(_line_of, self.written.values()))
            part.replace(folder / EXTENTS_MANIFEST)
            undone.pop_all()

    def append(
        self, name: str, tensors: Iterable[tuple[str, Tensor]], visit: Callable[[], None], first: int | None = None
    ) -> None:
        """Write one extent, its tensors as they come; `visit` is called after each. It counts once it is settled.

        Raises OSError, as when the disk is full. `first` is where a slice begins; None: the tensors are whole.
        """
        spans: list[Span] = []
        at = checksum = 0
        for tensor_name, tensor in tensors:
            data = bytes_of(tensor)
            padding = bytes(-at % TENSOR_ALIGNMENT)
            start = at + len(padding)
            spans.append(
                Span(
                    name=tensor_name,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    shape=tuple(tensor.shape),
                    offset=start,
                    size=len(data),
                )
            )
            for part in (memoryview(padding), data):
                checksum = zlib.crc32(part, checksum)
                write_all(self._data, part, self._end + at)
                at += len(part)
            visit()
        tail = bytes(-at % ALIGNMENT)
        write_all(self._data, memoryview(tail), self._end + at)
        extent = Extent(
            name=name,
            offset=self._end,
            size=at + len(tail),
            checksum=zlib.crc32(tail, checksum),
            spans=tuple(spans),
            first=first,
        )
        self._unsettled.append(extent)
        self._end += extent.size
        self.written[name] = extent

    def settle(self) -> None:
        """Bring to the disk what was appended, and then say so in the manifest. Raises OSError."""
        os.fsync(self._data)
        lines = [_line_of(extent) for extent in self._unsettled]
        self._unsettled.clear()
        self._note(*lines)

    def finish(self) -> None:
        """Everything is there."""
        self.settle()
        self._note({"extents": len(self.written)})

    def close(self) -> None:
        """Leave what is written."""
        os.close(self._data)
        os.close(self._manifest)

    def _note(self, *entries: Mapping[str, Any]) -> None:
        lines = b"".join(manifest_line(entry) for entry in entries)
        while lines:
            lines = lines[os.write(self._manifest, lines) :]
        os.fsync(self._manifest)


class ExtentFile:
    """The extents of one folder, for reading. It is closed with the last who uses it, or before that by `close`."""

    def __init__(self, folder: Path, origin: Origin, listed: Mapping[str, Extent] | None = None) -> None:
        """`listed` are the extents where the folder has no manifest of this form.

        Raises CorruptExtents where they are not all there, OSError where the file cannot be opened.
        """
        self.extents = _whole_manifest(folder, origin) if listed is None else dict(listed)
        self.slices: dict[str, tuple[Extent, ...]] = {}
        for extent in self.extents.values():
            if extent.first is not None:
                self.slices[extent.owner] = (*self.slices.get(extent.owner, ()), extent)
        self._folder = folder
        self._verified: set[str] = set()
        self._counting = threading.Lock()
        path = folder / DATA
        if path.stat().st_size < max(extent.offset + extent.size for extent in self.extents.values()):
            raise CorruptExtents(f"{path} is too short")
        self._fd = _open_to_read(path)
        self._finalize = weakref.finalize(self, os.close, self._fd)
        self.bytes_read = 0

    def layer(self, name: str) -> tuple[Extent, ...]:
        """All extents of a layer, in the order in which they lie: the layer's own, and those of its experts."""
        sliced = [part for owner, parts in self.slices.items() if owner.startswith(f"{name}.") for part in parts]
        return (self.extents[name], *sliced)

    def read(self, name: str, into: Tensor, is_stopped: Callable[[], bool] = lambda: False) -> Extent | None:
        """Read an extent into the first of `into`'s bytes, which begin at a page. None when it was stopped in between.

        The checksum is looked at when an extent is read for the first time. Raises CorruptExtents and OSError.
        """
        extent = self.extents[name]
        buffer, at = memory_of(into)[: extent.size], 0
        while at < extent.size:
            if is_stopped():
                return None
            count = os.preadv(self._fd, [buffer[at : at + CHUNK_BYTES]], extent.offset + at)
            if count == 0:
                raise CorruptExtents(f"extent `{name}` ends after {at:,} of {extent.size:,} bytes")
            at += count
        self._count(extent.size)
        if name not in self._verified:
            if zlib.crc32(buffer) != extent.checksum:
                raise CorruptExtents(f"extent `{name}` has another checksum than when it was written")
            self._verified.add(name)
        return extent

    def read_all(self, extents: Sequence[Extent], into: Tensor, is_stopped: Callable[[], bool] = lambda: False) -> bool:
        """Read extents one after another into the first of `into`'s bytes. False when it was stopped in between.

        Raises what `read` does.
        """
        at = 0
        for extent in extents:
            if self.read(extent.name, into[at:], is_stopped) is None:
                return False
            at += extent.size
        return True

    def read_rows(self, extents: Sequence[Extent], rows: Sequence[int], into: Tensor) -> None:
        """Read single rows of a vocabulary matrix, in rising order without repetition, one after another into `into`'s bytes.

        `extents` are all of its slices; neighbours are read together. Whole blocks are read, as direct I/O wants it, and the
        checksum of a slice is not looked at. Raises CorruptExtents and OSError.
        """
        row_bytes = extents[0].spans[0].size // extents[0].spans[0].shape[0]
        base, at = extents[0].offset + extents[0].spans[0].offset, 0
        for first, last in _runs(rows, row_bytes):
            start, end = base + first * row_bytes, base + (last + 1) * row_bytes
            begin = start // ALIGNMENT * ALIGNMENT
            block = pages(-(-end // ALIGNMENT) * ALIGNMENT - begin)
            if os.preadv(self._fd, [memory_of(block)], begin) < end - begin:
                raise CorruptExtents(f"`{extents[0].owner}` ends before row {last:,}")
            self._count(block.numel())
            for row in rows[bisect_left(rows, first) : bisect_right(rows, last)]:
                offset = base + row * row_bytes - begin
                into[at : at + row_bytes] = block[offset : offset + row_bytes]
                at += row_bytes

    def _count(self, size: int) -> None:
        with self._counting:
            self.bytes_read += size

    def delete(self) -> None:
        """Delete the files of the folder, unless another runner has made them anew since; who has them open can go on reading.

        Raises OSError.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._fd), (self._folder / DATA).stat()):
                delete_extents(self._folder)

    def refusal(self, error: CorruptExtents) -> Exception:
        """What to raise when a piece has changed. These are our own: they are deleted, so that they are made again."""
        self.delete()
        return AttemptEnded(
            stage="generating",
            code="weights_corrupt",
            message=f"Weights on disk have changed since they were written: {error}. They will be written again.",
            error_type=type(error).__name__,
        )

    def close(self) -> None:
        """Close the file."""
        self._finalize()


def delete_extents(folder: Path) -> None:
    """Delete the files that make up extents. Raises OSError."""
    delete_manifest(folder)
    (folder / DATA).unlink(missing_ok=True)


def delete_manifest(folder: Path) -> None:
    """Delete what says where extents lie. Raises OSError."""
    (folder / EXTENTS_MANIFEST).unlink(missing_ok=True)


def _runs(rows: Sequence[int], row_bytes: int) -> list[tuple[int, int]]:
    """First and last of rows that lie in neighbouring blocks, so that one read brings them; none is longer than a chunk."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and (row - runs[-1][1] - 1) * row_bytes < ALIGNMENT and (row + 1 - runs[-1][0]) * row_bytes <= CHUNK_BYTES:
            runs[-1] = (runs[-1][0], row)
        else:
            runs.append((row, row))
    return runs


def _open_to_read(path: Path) -> int:
    """Past the page cache where the file system can do that, so that a model larger than memory pushes nothing out of it."""
    flags, direct = os.O_RDONLY | os.O_CLOEXEC, getattr(os, "O_DIRECT", 0)
    with contextlib.suppress(OSError):  # some refuse at once, others at the first read
        fd = os.open(path, flags | direct)
        try:
            os.preadv(fd, [memory_of(pages(ALIGNMENT))], 0)
        except OSError:
            os.close(fd)
            raise
        return fd
    return os.open(path, flags)


def _line_of(extent: Extent) -> dict[str, Any]:
    spans = [[span.name, span.dtype, span.shape, span.offset, span.size] for span in extent.spans]
    return {
        "name": extent.name,
        "offset": extent.offset,
        "size": extent.size,
        "crc32": extent.checksum,
        "first": extent.first,
        "tensors": spans,
    }


def _whole_manifest(folder: Path, origin: Origin) -> dict[str, Extent]:
    extents, lines = _read_manifest(folder, origin)
    if not lines or not is_last_line(lines[-1]):
        raise CorruptExtents(f"{folder} holds no whole model")
    return extents


def _read_manifest(folder: Path, origin: Origin) -> tuple[dict[str, Extent], list[dict[str, Any]]]:
    """The extents that are there, and the manifest's whole lines; nothing of another origin."""
    try:
        text = (folder / EXTENTS_MANIFEST).read_bytes()
    except FileNotFoundError:
        return {}, []
    lines: list[dict[str, Any]] = []
    extents: dict[str, Extent] = {}
    for line in text.split(b"\n")[:-1]:
        try:
            entry = manifest_entry(line)
            if "name" in entry:
                extent = _extent_of(entry)
                extents[extent.name] = extent
        except (ValueError, KeyError, TypeError):
            break
        lines.append(entry)
    return (extents, lines) if lines[:1] == [origin.header()] else ({}, [])


def _extent_of(entry: Mapping[str, Any]) -> Extent:
    spans = tuple(
        Span(name=name, dtype=dtype, shape=tuple(shape), offset=offset, size=size)
        for name, dtype, shape, offset, size in entry["tensors"]
    )
    return Extent(
        name=entry["name"],
        offset=entry["offset"],
        size=entry["size"],
        checksum=entry["crc32"],
        spans=spans,
        first=entry["first"],
    )
