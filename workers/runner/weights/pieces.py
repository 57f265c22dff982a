"""Who brings the weights of a forward pass, piece by piece: into host memory, and from there to the device?

A piece is what is brought at once: a layer, or a tile of the output head. Pieces come in the order of a forward pass, round and
round, so that the first of the next pass come while the head of this one computes. What was brought for a pass that broke off is
given back unused.

`HostPieces` brings them into host memory: those that stay there lie there already, the others one thread reads from disk into
slots that take turns. Where the device computes in that memory nothing more is to be done; for other devices whoever takes a
piece copies it.

`DevicePieces` brings them on to slots of the device, one ahead of what computes, on a stream of its own. Two kinds of events
guard the slots: what computes waits until the copy has arrived, a copy waits until what computed with the slot has ended. A host
slot is read into again only when its copy has arrived.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import torch
from torch import Tensor

from ollm_service.core.passing import DEVICE_SLOTS
from workers.runner.interruptions import AttemptEnded
from workers.runner.raw import pages
from workers.runner.weights.extents import CorruptExtents, Extent, ExtentFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Extents that lie one after another. `kept` begins with their bytes where those stay in host memory; None: on disk."""

    name: str
    extents: tuple[Extent, ...]
    kept: Tensor | None = None

    @property
    def size(self) -> int:
        """In bytes, padding included."""
        return sum(extent.size for extent in self.extents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """A piece's bytes, good until they are given back. In the same `slot` they always lie at the same place; None: they stay."""

    name: str
    held: Tensor
    slot: int | None


class Pieces(Protocol):
    """What brings pieces while it is open."""

    def open(self, pieces: Sequence[Piece]) -> None:
        """Begin to bring these, round and round. Raises MemoryError and OSError without memory for slots."""

    def take(self, name: str) -> Brought:
        """The next piece of this name. Raises what bringing it raised."""

    def give_back(self, brought: Brought) -> None:
        """It is not used any more, by anything that is enqueued from now on."""

    def close(self) -> None:
        """Bring no more. It can be opened again."""

    @property
    def is_broken(self) -> bool:
        """Whether something could not be brought since it was opened."""


class HostPieces:
    """Pieces in host memory: those from disk in at most so many slots, which are page-locked for a CUDA device."""

    def __init__(self, source: ExtentFile, slots: int, device: torch.device) -> None:
        self._source = source
        self._most_slots = slots
        self._device = device
        self._kept: dict[str, Tensor] = {}
        self._order: list[Piece] = []
        self._slots: list[Tensor] = []
        self._changed = threading.Condition()
        self._free: deque[int] = deque()
        self._ready: deque[tuple[int, str]] = deque()
        self._error: BaseException | None = None
        self._is_closed = True
        self._reader: threading.Thread | None = None

    def open(self, pieces: Sequence[Piece]) -> None:
        """Begin to read."""
        self._kept = {piece.name: piece.kept for piece in pieces if piece.kept is not None}
        self._order = [piece for piece in pieces if piece.kept is None]
        count, largest = min(self._most_slots, len(self._order)), max((piece.size for piece in self._order), default=0)
        if len(self._slots) < count or any(slot.numel() < largest for slot in self._slots):
            self._slots = []  # before others are made
            self._slots = [pages(largest, self._device) for _ in range(count)]
        self._free, self._error, self._is_closed = deque(range(count)), None, False
        self._ready.clear()
        if self._order:
            self._reader = threading.Thread(target=self._read_on, name="weights", daemon=True)
            self._reader.start()

    def take(self, name: str) -> Brought:
        """The piece with this name, from disk as soon as it is read. Raises what the reader met."""
        if name in self._kept:
            return Brought(name=name, held=self._kept[name], slot=None)
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._ready or self._error or self._is_closed)
                if not self._ready:
                    raise self.ended() from self._error
                slot, found = self._ready.popleft()
                if found == name:
                    return Brought(name=name, held=self._slots[slot], slot=slot)
                self._free.append(slot)
                self._changed.notify_all()

    def give_back(self, brought: Brought) -> None:
        """From now on something else may be read into its slot."""
        if brought.slot is None:
            return
        with self._changed:
            self._free.append(brought.slot)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading. Whoever waits for a piece gets an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._reader is not None:
            self._reader.join()
            self._reader = None

    @property
    def is_broken(self) -> bool:
        """Whether something could not be read."""
        return self._error is not None

    def ended(self, error: BaseException | None = None) -> Exception:
        """What to raise when no more weights come: for what the reader met, or for what whoever asks has met."""
        self._error = error or self._error
        if isinstance(self._error, CorruptExtents):
            return self._source.refusal(self._error)
        if isinstance(self._error, OSError):
            return AttemptEnded(
                stage="generating",
                code="weights_unreadable",
                message=f"Weights cannot be read from disk: {self._error.strerror or self._error}.",
                error_type=type(self._error).__name__,
            )
        return RuntimeError("the weights are not being read any more")

    def _read_on(self) -> None:
        """The reader's thread."""
        for piece in cycle(self._order):
            with self._changed:
                self._changed.wait_for(lambda: self._free or self._is_closed)
                if self._is_closed:
                    return
                slot = self._free.popleft()
            try:
                is_whole = self._source.read_all(piece.extents, self._slots[slot], lambda: self._is_closed)
            except Exception as error:  # noqa: BLE001 - told to whoever waits for the piece
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            if not is_whole:
                return
            with self._changed:
                self._ready.append((slot, piece.name))
                self._changed.notify_all()


class DevicePieces:
    """Pieces in `DEVICE_SLOTS` slots of a device. It opens and closes the host's.

    All slots are taken when the first piece is asked for: until then pieces may still become smaller, and page-locked memory is
    dear. Streams and events
    are those of the device's own module in torch; the CPU's do nothing, and there a copy is over when it was called.
    """

    def __init__(self, host: HostPieces, device: torch.device) -> None:
        self._host = host
        self._device = device
        self._runtime: Any = torch.get_device_module(device)
        self._stream: Any = self._runtime.Stream(device) if device.type == "cuda" else self._runtime.Stream()
        self._pieces: tuple[Piece, ...] = ()
        self._slots: list[Tensor] = []
        self._changed = threading.Condition()
        self._free: deque[tuple[int, Any]] = deque()  # each with the event after which it may be written to
        self._ready: deque[tuple[int, str, Any]] = deque()  # each with the event of its arrival
        self._error: Exception | None = None
        self._is_closed = True
        self._carrier: threading.Thread | None = None

    def open(self, pieces: Sequence[Piece]) -> None:
        """Begin to read and to copy when the first piece is asked for."""
        self._pieces, self._error, self._is_closed = tuple(pieces), None, False

    def take(self, name: str) -> Brought:
        """The piece with this name; what is enqueued from now on finds it there. Raises what bringing it raised."""
        if self._carrier is None and not self._is_closed:
            self._begin()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._error or self._is_closed)
                if not self._ready:
                    raise self._error or self._host.ended()
                slot, found, has_arrived = self._ready.popleft()
            if found == name:
                self._runtime.current_stream(self._device).wait_event(has_arrived)
                return Brought(name=name, held=self._slots[slot], slot=slot)
            self._leave(slot, has_arrived)

    def give_back(self, brought: Brought) -> None:
        """Its slot is written to again as soon as what is enqueued now has been computed."""
        assert brought.slot is not None
        self._leave(brought.slot, self._event_on(self._runtime.current_stream(self._device)))

    def close(self) -> None:
        """Stop reading and copying, and leave the device's memory. No copy is under way after that."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._host.close()
        if self._carrier is not None:
            self._carrier.join()
            self._carrier = None
        self._free.clear()
        self._ready.clear()
        self._slots.clear()

    @property
    def is_broken(self) -> bool:
        """Whether something could not be read or copied."""
        return self._error is not None or self._host.is_broken

    def _begin(self) -> None:
        """Take the slots. Their memory may be that of tensors which the device still computes with: copies wait for that."""
        count, largest = min(DEVICE_SLOTS, len(self._pieces)), max(piece.size for piece in self._pieces)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(count)]
        self._host.open(self._pieces)
        is_free = self._event_on(self._runtime.current_stream(self._device))
        self._free.extend((slot, is_free) for slot in range(count))
        self._carrier = threading.Thread(target=self._carry_on, name="weights-to-device", daemon=True)
        self._carrier.start()

    @torch.inference_mode()  # as whoever has made the slots
    def _carry_on(self) -> None:
        """The carrier's thread."""
        try:
            with self._runtime.stream(self._stream):
                for piece in cycle(self._pieces):
                    if not self._carry(piece):
                        return
        except Exception as error:  # noqa: BLE001 - told to whoever waits for the piece
            with self._changed:
                self._error = None if self._is_closed else error
                self._changed.notify_all()

    def _carry(self, piece: Piece) -> bool:
        """Bring one piece; False when that was stopped."""
        brought = self._host.take(piece.name)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._free or self._is_closed)
                if self._is_closed:
                    return False
                slot, may_be_written = self._free.popleft()
            self._stream.wait_event(may_be_written)
            self._slots[slot][: piece.size].copy_(brought.held[: piece.size], non_blocking=True)
            has_arrived = self._event_on(self._stream)
            with self._changed:
                self._ready.append((slot, piece.name, has_arrived))
                self._changed.notify_all()
            has_arrived.synchronize()  # only then may other bytes come to where these lie in host memory
        finally:
            self._host.give_back(brought)
        return True

    def _leave(self, slot: int, may_be_written: Any) -> None:
        with self._changed:
            self._free.append((slot, may_be_written))
            self._changed.notify_all()

    def _event_on(self, stream: Any) -> Any:
        """An event after all that is on the stream so far. Whoever waits for it sleeps."""
        event = self._runtime.Event(blocking=True) if self._device.type == "cuda" else self._runtime.Event()
        event.record(stream)
        return event
