"""How do layers that are not kept pass through the device? Each takes its weights when it begins and gives them back at its end.

In between its parameters are on the meta device and hold no memory. `pieces` brings the weights in the order in which a forward
pass asks for layers, the next while this one computes. On the CPU and on CUDA devices parameters are views of what was brought,
the same every time; on others they are copies, made when the layer begins.

Where the vocabulary stays on disk, the tiles of the output head follow the last layer in the same slots. Where only those experts
are read that the router asks for, layers come without theirs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ollm_service.core.passing import DEVICE_SLOTS, HOST_SLOTS
from workers.runner.weights.extents import Extent, ExtentFile, tensors_of
from workers.runner.weights.pieces import Brought, DevicePieces, HostPieces, Piece, Pieces


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
    them. `brings_ahead`: they are copied to slots of the device while others compute; unless told otherwise on CUDA devices.
    """

    def __init__(
        self,
        layers: Sequence[OffDevice],
        source: ExtentFile,
        device: torch.device,
        host: Mapping[str, Tensor],
        tiles: Sequence[Extent] = (),
        *,
        brings_ahead: bool | None = None,
    ) -> None:
        self.layers = layers
        self.source = source
        self.device = device
        self.host = host
        self._tiles = tuple(tiles)
        self._left_out: frozenset[str] = frozenset()
        self._extents = self._extents_of_a_pass()
        is_ahead = device.type == "cuda" if brings_ahead is None else brings_ahead
        self._from_source = HostPieces(source, HOST_SLOTS if is_ahead else DEVICE_SLOTS, device)
        self._pieces: Pieces = DevicePieces(self._from_source, device) if is_ahead else self._from_source
        self._parameters: dict[tuple[int | None, str], dict[str, nn.Parameter]] = {}
        self._absent = {layer.extent: {key: place.get() for key, place in layer.places.items()} for layer in layers}
        self._held: tuple[Brought, OffDevice] | None = None
        self._is_closed = True
        self._hooks: list[Any] = []
        self.layers_brought = 0
        self.tiles_brought = 0
        self.rows_looked_up = 0

    def open(self) -> None:
        """Begin to read, and to serve the layers."""
        self._is_closed = False
        for layer in self.layers:
            self._hooks.append(layer.module.register_forward_pre_hook(self._before(layer)))
            self._hooks.append(layer.module.register_forward_hook(self._after, always_call=True))
        pieces = [Piece(name=name, extents=extents, kept=self.host.get(name)) for name, extents in self._extents.items()]
        self._pieces.open(pieces)

    def leave_out(self, owners: Collection[str]) -> None:
        """From now on layers come without what these modules hold, of which each has slices of its own; of none: whole."""
        is_open = not self._is_closed
        self.close()
        self._left_out = frozenset(owners)
        self._extents = self._extents_of_a_pass()
        if is_open and not self.is_broken:
            self.open()

    @contextmanager
    def tile(self, extent: Extent) -> Iterator[Tensor]:
        """The rows of one tile of the head, on the device, for as long as they are needed; tiles are asked for in their order.

        Raises what reading them raised.
        """
        brought = self._pieces.take(extent.name)
        try:
            self.tiles_brought += 1
            yield on_device(extent.spans[0].of(brought.held), self.device)
        finally:
            self._pieces.give_back(brought)

    def _extents_of_a_pass(self) -> Mapping[str, tuple[Extent, ...]]:
        """What is brought in one piece, by the name of its first extent."""
        layers = {layer.extent: self.source.layer(layer.extent) for layer in self.layers}
        wanted = {name: tuple(part for part in parts if part.owner not in self._left_out) for name, parts in layers.items()}
        return wanted | {tile.name: (tile,) for tile in self._tiles}

    @property
    def is_broken(self) -> bool:
        """Whether there was something that could not be read, or not be brought to the device."""
        return self._pieces.is_broken

    def ended(self, error: BaseException) -> Exception:
        """What to raise for what a reader of other weights of the same source has met: the stream brings no more."""
        return self._from_source.ended(error)

    def close(self) -> None:
        """Stop reading; the layers are without weights again, and the stream can be opened again."""
        self._is_closed = True
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._let_go()
        self._parameters.clear()  # views of slots of the device, which are given up
        self._pieces.close()

    def _before(self, layer: OffDevice) -> Callable[..., None]:
        def bring(_module: nn.Module, _arguments: Any) -> None:
            brought = self._pieces.take(layer.extent)
            self._held = (brought, layer)
            for key, parameter in self._parameters_in(brought).items():
                layer.places[key].put(parameter)
            self.layers_brought += 1

        return bring

    def _after(self, _module: nn.Module, _arguments: Any, _output: Any) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._held is None:
            return
        brought, layer = self._held
        self._held = None
        for key, parameter in self._absent[layer.extent].items():
            layer.places[key].put(parameter)
        self._pieces.give_back(brought)

    def _parameters_in(self, brought: Brought) -> Mapping[str, nn.Parameter]:
        """The layer's weights on the device: views of what was brought, the same every time, or copies where it is elsewhere."""
        known = self._parameters.get((brought.slot, brought.name))
        if known is None:
            known = {
                key: nn.Parameter(on_device(tensor, self.device), requires_grad=False)
                for key, tensor in tensors_of(brought.held, self._extents[brought.name]).items()
            }
            if brought.held.device.type == self.device.type:
                self._parameters[brought.slot, brought.name] = known
        return known


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor itself if it is there already, else a copy."""
    return tensor if tensor.device == device else tensor.to(device)
