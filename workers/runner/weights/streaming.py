"""How do layers that are not kept pass through the device? One reader brings the next while this one computes.

`DEVICE_SLOTS` buffers take turns. The reader fills them in the order in which a forward pass asks for layers, round and round, so
that the first layers of the next pass come while the head of this one computes. A layer takes its weights from its slot when it
begins and gives the slot back when it ends; in between its parameters are on the meta device and hold no memory.

Where the vocabulary stays on disk, the tiles of the output head follow the last layer in the same slots. Where only those experts
are read that the router asks for, layers come without theirs.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ollm_service.core.passing import DEVICE_SLOTS
from workers.runner.interruptions import AttemptEnded
from workers.runner.raw import pages
from workers.runner.weights.extents import CorruptExtents, Extent, ExtentFile, tensors_of


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter hangs in a model, and how its module calls it."""

    module: nn.Module
    name: str

    def get(self) -> nn.Parameter | None:
        """What hangs there now."""
        return self.module._parameters[self.name]

    def put(self, parameter: nn.Parameter | None) -> None:
        """Hang another parameter there. Assigning to `data` would not do: a meta tensor cannot become a real one."""
        self.module._parameters[self.name] = parameter


@dataclass(frozen=True, slots=True)
class OffDevice:
    """One layer whose weights are elsewhere: its module, its extent's name, and a place for each of its weights by name."""

    module: nn.Module
    extent: str
    places: Mapping[str, Place]


def off_device(root: nn.Module, name: str, extents: Sequence[Extent]) -> OffDevice:
    """A layer by its name. Raises ValueError where its extents do not hold exactly its weights."""
    layer = root.get_submodule(name)
    wanted = {f"{name}.{key}" for key, _ in layer.named_parameters()}
    given = {span.name for extent in extents for span in extent.spans}
    if wanted != given:
        raise ValueError(f"extent `{name}` and the layer differ in {', '.join(sorted(wanted ^ given)[:3])}")
    return OffDevice(module=layer, extent=name, places=MappingProxyType({key: place_of(root, key) for key in sorted(given)}))


def place_of(root: nn.Module, key: str) -> Place:
    """Where the parameter of this name hangs."""
    parent, _, name = key.rpartition(".")
    return Place(root.get_submodule(parent), name)


def layer_names(module: nn.Module) -> list[str]:
    """The names of the decoder layers, in their order: the entries of the decoder's longest module list.

    A tower for images or sounds may have more layers than the decoder, and is no part of it.
    """
    find = getattr(module, "get_decoder", None)
    decoder = module if find is None else find()
    prefix = next((name for name, child in module.named_modules() if child is decoder and name), "")
    lists = {name: len(child) for name, child in decoder.named_modules() if isinstance(child, nn.ModuleList)}
    longest = max(lists, key=lambda name: lists[name], default=None)
    if longest is None:
        return []
    path = f"{prefix}.{longest}" if prefix else longest
    return [f"{path}.{number}" for number in range(lists[longest])]


class LayerStream:
    """Brings layers to the device while it is open: those in `host`, whose bytes are in host memory, and the others from disk.

    `layers` are in the order of a forward pass; `tiles` are the extents of an output head that stays on disk, which come after
    them.
    """

    def __init__(
        self,
        layers: Sequence[OffDevice],
        source: ExtentFile,
        device: torch.device,
        host: Mapping[str, Tensor],
        tiles: Sequence[Extent] = (),
    ) -> None:
        self.layers = layers
        self.source = source
        self.device = device
        self.host = host
        self._tiles = tuple(tiles)
        self._left_out: frozenset[str] = frozenset()
        self._pieces = self._pieces_of_a_pass()
        self._from_disk = self._order()
        largest = max((sum(extent.size for extent in self._pieces[name]) for name in self._from_disk), default=0)
        self._slots = [pages(largest) for _ in range(min(DEVICE_SLOTS, len(self._from_disk)))]
        self._parameters: dict[tuple[int | None, str], dict[str, nn.Parameter]] = {}
        self._absent = {layer.extent: {key: place.get() for key, place in layer.places.items()} for layer in layers}
        self._changed = threading.Condition()
        self._free: deque[int] = deque()
        self._ready: deque[tuple[int, str]] = deque()
        self._held: tuple[int | None, OffDevice] | None = None
        self._error: BaseException | None = None
        self._is_closed = True
        self._hooks: list[Any] = []
        self._reader: threading.Thread | None = None
        self.layers_brought = 0
        self.tiles_brought = 0
        self.rows_looked_up = 0

    def open(self) -> None:
        """Begin to read, and to serve the layers."""
        self._free, self._error, self._is_closed = deque(range(len(self._slots))), None, False
        self._ready.clear()
        for layer in self.layers:
            self._hooks.append(layer.module.register_forward_pre_hook(self._before(layer)))
            self._hooks.append(layer.module.register_forward_hook(self._after, always_call=True))
        if self._from_disk:
            self._reader = threading.Thread(target=self._read_on, name="weights", daemon=True)
            self._reader.start()

    def leave_out(self, owners: Collection[str]) -> None:
        """From now on layers come without what these modules hold, of which each has slices of its own; of none: whole."""
        is_open = not self._is_closed
        self.close()
        self._left_out = frozenset(owners)
        self._parameters.clear()
        self._pieces = self._pieces_of_a_pass()
        if is_open and not self.is_broken:
            self.open()

    @contextmanager
    def tile(self, extent: Extent) -> Iterator[Tensor]:
        """The rows of one tile of the head, on the device, for as long as they are needed; tiles are asked for in their order.

        Raises what reading them raised.
        """
        slot = self._take(extent.name)
        try:
            self.tiles_brought += 1
            yield on_device(extent.spans[0].of(self._slots[slot]), self.device)
        finally:
            self._give_back(slot)

    def _pieces_of_a_pass(self) -> Mapping[str, Sequence[Extent]]:
        """What is brought in one piece, by the name of its first extent."""
        layers = {layer.extent: self.source.layer(layer.extent) for layer in self.layers}
        wanted = {name: tuple(part for part in parts if part.owner not in self._left_out) for name, parts in layers.items()}
        return wanted | {tile.name: (tile,) for tile in self._tiles}

    def _order(self) -> list[str]:
        return [name for name in self._pieces if name not in self.host]

    @property
    def is_broken(self) -> bool:
        """Whether the reader met something that it could not read."""
        return self._error is not None

    def close(self) -> None:
        """Stop reading; the layers are without weights again, and the stream can be opened again."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        self._let_go()

    def _read_on(self) -> None:
        """The reader's thread."""
        turn = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._free or self._is_closed)
                if self._is_closed:
                    return
                slot = self._free.popleft()
            extent = self._from_disk[turn % len(self._from_disk)]
            try:
                is_whole = self.source.read_all(self._pieces[extent], self._slots[slot], lambda: self._is_closed)
            except Exception as error:  # noqa: BLE001 - told to whoever waits for the layer
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            if not is_whole:
                return
            turn += 1
            with self._changed:
                self._ready.append((slot, extent))
                self._changed.notify_all()

    def _before(self, layer: OffDevice) -> Callable[..., None]:
        def bring(_module: nn.Module, _arguments: Any) -> None:
            slot = None if layer.extent in self.host else self._take(layer.extent)
            self._held = (slot, layer)
            for key, parameter in self._parameters_in(slot, layer.extent).items():
                layer.places[key].put(parameter)
            self.layers_brought += 1

        return bring

    def _after(self, _module: nn.Module, _arguments: Any, _output: Any) -> None:
        self._let_go()

    def _take(self, extent: str) -> int:
        """The slot with this layer. What was read for a pass that broke off is given back. Raises what the reader met."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._ready or self._error or self._is_closed)
                if not self._ready:
                    raise self.ended() from self._error
                slot, found = self._ready.popleft()
                if found == extent:
                    return slot
                self._free.append(slot)
                self._changed.notify_all()

    def ended(self, error: BaseException | None = None) -> Exception:
        """What to raise when no more weights come: for what the reader met, or for what whoever asks has met."""
        self._error = error or self._error
        if isinstance(self._error, CorruptExtents):
            return self.source.refusal(self._error)
        if isinstance(self._error, OSError):
            return AttemptEnded(
                stage="generating",
                code="weights_unreadable",
                message=f"Weights cannot be read from disk: {self._error.strerror or self._error}.",
                error_type=type(self._error).__name__,
            )
        return RuntimeError("the weights are not being read any more")

    def _let_go(self) -> None:
        if self._held is None:
            return
        slot, layer = self._held
        self._held = None
        for key, parameter in self._absent[layer.extent].items():
            layer.places[key].put(parameter)
        if slot is not None:
            self._give_back(slot)

    def _give_back(self, slot: int) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def _parameters_in(self, slot: int | None, extent: str) -> Mapping[str, nn.Parameter]:
        """The layer's weights on the device: on the CPU views of the slot, the same every time, elsewhere copies."""
        known = self._parameters.get((slot, extent))
        if known is None:
            held = self.host[extent] if slot is None else self._slots[slot]
            known = {
                key: nn.Parameter(on_device(tensor, self.device), requires_grad=False)
                for key, tensor in tensors_of(held, self._pieces[extent]).items()
            }
            if self.device.type == "cpu":
                self._parameters[slot, extent] = known
        return known


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor itself if it is there already, else a copy."""
    return tensor if tensor.device == device else tensor.to(device)
