"""How do only the experts come from disk that a router has asked for? Each by itself, the next ones while one computes.

`RoutedExperts` takes the place of a layer's stacked experts on our own model. For each expert that tokens were sent to, in rising
order, it hangs that one's weights into the model's own module, as if that had one expert, and lets transformers' eager code
compute the tokens that were sent there.

N tokens of a forward pass, M of them sent to one expert, K experts of a token, H hidden size.
"""

import inspect
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ollm_service.core.passing import EXPERT_SLOTS
from workers.runner.raw import pages
from workers.runner.weights.extents import CorruptExtents, Extent, tensors_of
from workers.runner.weights.parts import experts_of
from workers.runner.weights.streaming import LayerStream, on_device

_READERS = EXPERT_SLOTS - 1


@dataclass(slots=True)
class ExpertTraffic:
    """What real forward passes asked for, in experts and in bytes, and what there was.

    `bytes_read` are those of whole extents, `bytes_hit` of the distinct experts' tensors alone, `bytes_there` those of all
    experts of the layers that were passed.
    """

    hit: int = 0
    there: int = 0
    bytes_read: int = 0
    bytes_hit: int = 0
    bytes_there: int = 0


class ExpertReader:
    """Reads experts of one stream into slots of its own while it is open."""

    def __init__(self, stream: LayerStream, largest: int) -> None:
        self._stream = stream
        self._slots = [pages(largest, stream.device) for _ in range(EXPERT_SLOTS)]
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="experts")

    def bring(self, extents: Sequence[Extent]) -> Generator[Tensor, None, None]:
        """Each expert's bytes, in this order, good until the next is asked for. Raises what reading them raised."""
        waiting: deque[tuple[int, Future[Extent | None]]] = deque()
        free, later = deque(range(len(self._slots))), deque(extents)
        try:
            while waiting or later:
                while free and later:
                    slot = free.popleft()
                    waiting.append((slot, self._readers.submit(self._read, later.popleft(), slot)))
                slot, read = waiting.popleft()
                try:
                    read.result()
                except (CorruptExtents, OSError) as error:
                    raise self._stream.ended(error) from error
                yield self._slots[slot]
                free.append(slot)
        finally:
            for _slot, read in waiting:  # nobody may write to a slot that is used again
                read.cancel() or read.exception()

    def close(self) -> None:
        """End the readers."""
        self._readers.shutdown()

    def _read(self, extent: Extent, slot: int) -> Extent | None:
        return self._stream.source.read(extent.name, self._slots[slot])


class RoutedExperts(nn.Module):
    """Stacked experts of which only those are brought that tokens were sent to.

    `extents` are the experts in their order; `bring` gives the bytes of those that it is asked for.
    """

    def __init__(
        self,
        inner: nn.Module,
        extents: Sequence[Extent],
        bring: Callable[[Sequence[Extent]], Generator[Tensor, None, None]],
        device: torch.device,
        traffic: ExpertTraffic,
    ) -> None:
        super().__init__()
        self.inner = inner
        self._extents = extents
        self._bring = bring
        self._device = device
        self._traffic = traffic
        self._compute = eager_code(inner)
        self._all_bytes = sum(extent.payload for extent in extents)

    def forward(self, hidden_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The sum [N, H] of what each token's experts make of it, each times its weight. Numbers of no expert count nothing."""
        given_NK = experts_NK.cpu()  # the one time that a device is waited for, however many experts are hit
        hit = [number for number in torch.unique(given_NK).tolist() if number < len(self._extents)]
        chosen = [self._extents[number] for number in hit]
        output_NH = torch.zeros_like(hidden_NH)
        absent, count = dict(self.inner._parameters), self.inner.num_experts
        self.inner.num_experts = 1  # type: ignore[assignment]  # torch declares attributes to be tensors or modules
        try:
            with closing(self._bring(chosen)) as brought:  # so that whatever breaks off here waits for reads in flight
                for number, extent, held in zip(hit, chosen, brought, strict=True):
                    self._hang(extent, held)
                    found = torch.where(given_NK == number)
                    token_M, place_M = (index_M.to(self._device, non_blocking=True) for index_M in found)
                    made_MH = self._made(hidden_NH[token_M], weights_NK[token_M, place_M, None])
                    output_NH.index_add_(0, token_M, made_MH)
        finally:
            self.inner.num_experts = count
            self.inner._parameters.update(absent)
        self._count(chosen)
        return output_NH

    def _made(self, hidden_MH: Tensor, weight_M1: Tensor) -> Tensor:
        """What the one expert that hangs there makes of these tokens."""
        count = hidden_MH.shape[0]
        missing = _computed_tokens(count) - count if _compiles_by_shape(hidden_MH) else 0
        if missing:
            hidden_MH, weight_M1 = (functional.pad(tensor, (0, 0, 0, missing)) for tensor in (hidden_MH, weight_M1))
        first_M1 = torch.zeros(weight_M1.shape, dtype=torch.long, device=self._device)
        made_MH: Tensor = self._compute(self.inner, hidden_MH, first_M1, weight_M1)
        return made_MH[:count]

    def _hang(self, extent: Extent, held: Tensor) -> None:
        for key, tensor in tensors_of(held, (extent,)).items():
            name = key.rpartition(".")[2]
            self.inner._parameters[name] = nn.Parameter(on_device(tensor, self._device), requires_grad=False)

    def _count(self, chosen: Sequence[Extent]) -> None:
        traffic = self._traffic
        traffic.hit += len(chosen)
        traffic.there += len(self._extents)
        traffic.bytes_read += sum(extent.size for extent in chosen)
        traffic.bytes_hit += sum(extent.payload for extent in chosen)
        traffic.bytes_there += self._all_bytes


def _compiles_by_shape(hidden: Tensor) -> bool:
    """Whether products are compiled anew for each number of rows.

    For half precision on the CPU that takes oneDNN up to 20 ms, and it keeps 0.6 MB of each; experts would need one for every
    number of tokens.
    """
    return hidden.device.type == "cpu" and hidden.element_size() < 4


def _computed_tokens(count: int) -> int:
    """A number of tokens that is not much larger, of which there are only four for each power of two."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedPlace:
    """Where experts hang that do not stay on the device: their module, its parent, and the layer's extent."""

    parent: nn.Module
    name: str
    inner: nn.Module
    owner: str
    layer: str


def routed_places(stream: LayerStream, root: nn.Module) -> list[RoutedPlace]:
    """The stacked experts of a stream's layers whose slices were laid out, and that transformers' eager code can compute."""
    found = []
    for layer in stream.layers:
        for owner, inner in experts_of(root, layer.extent).items():
            if owner in stream.source.slices and eager_code(inner) is not None:
                parent, _, name = owner.rpartition(".")
                place = RoutedPlace(parent=root.get_submodule(parent), name=name, inner=inner, owner=owner, layer=layer.extent)
                found.append(place)
    return found


def eager_code(inner: nn.Module) -> Any:
    """The plain function of (module, hidden_NH, experts_NK, weights_NK) behind those that transformers may choose; None: none."""
    forward: Any = type(inner).forward
    plain = inspect.unwrap(forward)
    return None if plain is forward else plain
