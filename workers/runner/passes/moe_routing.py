"""moe-routing: of layers that do not stay on the device only those experts are brought that a router has sent tokens to."""

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial

from torch import Tensor

from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from workers.runner.model import LoadedModel
from workers.runner.weights.extents import Extent
from workers.runner.weights.routing import ExpertReader, ExpertTraffic, RoutedExperts, RoutedPlace, routed_places


class MoeRouting:
    """The pass. Evidence: the experts that real forward passes hit and the bytes that came for them, beside all there were."""

    pass_id = PassId.MOE_ROUTING

    def __init__(self, model: LoadedModel, command: Execute) -> None:
        self._model = model
        self._expert_count = command.profile.expert_count
        self._places = [] if model.stream is None else routed_places(model.stream, model.module)
        self._replaced: list[RoutedPlace] = []
        self._reader: ExpertReader | None = None
        self._traffic = ExpertTraffic()

    def check(self) -> PassOutcome | None:
        """Not needed where all layers with experts stay on the device; fails where experts cannot be told apart."""
        if self._model.stream is None:
            return NotNeeded(reason="every expert is in memory")
        if not self._places and self._expert_count:
            return Failed(reason="the experts of the layers off the device cannot be told apart", error_type="NoExperts")
        return None if self._places else NotNeeded(reason="no layer off the device has experts")

    def apply(self) -> None:
        """From now on layers come without their experts, and those one by one."""
        stream = self._model.stream
        assert stream is not None
        slices = stream.source.slices
        from_disk = [extent.size for place in self._places if place.layer not in stream.host for extent in slices[place.owner]]
        if from_disk:
            self._reader = ExpertReader(stream, max(from_disk))
        stream.leave_out([place.owner for place in self._places])
        for place in self._places:
            routed = RoutedExperts(place.inner, slices[place.owner], self._source_of(place), self._model.device, self._traffic)
            self._replaced.append(place)
            setattr(place.parent, place.name, routed)

    def evidence(self) -> PassOutcome:
        """Applied with the counts; failed where no forward pass hit an expert."""
        seen = self._traffic
        if seen.hit == 0:
            return Failed(reason="no forward pass went through a router", error_type="NoEvidence")
        brought = f"{seen.bytes_read:,} of {seen.bytes_there:,} expert bytes brought"
        return Applied(evidence=f"{seen.hit:,} of {seen.there:,} experts hit; {brought}")

    def undo(self) -> None:
        """Put the model's own experts back; layers come whole again."""
        while self._replaced:
            place = self._replaced.pop()
            setattr(place.parent, place.name, place.inner)
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._model.stream is not None:
            self._model.stream.leave_out([])

    def measured(self) -> Mapping[str, float]:
        """Sums over all forward passes: bytes brought, bytes of the experts hit alone, and bytes of all experts."""
        return {
            "experts_hit": float(self._traffic.hit),
            "expert_bytes_read": float(self._traffic.bytes_read),
            "expert_bytes_routed_ideal": float(self._traffic.bytes_hit),
            "expert_bytes_all": float(self._traffic.bytes_there),
        }

    def _source_of(self, place: RoutedPlace) -> Callable[[Sequence[Extent]], Generator[Tensor, None, None]]:
        """Where this layer's experts come from: its bytes in host memory, or the disk."""
        stream = self._model.stream
        assert stream is not None
        if place.layer in stream.host:
            return partial(_in_host, stream.host[place.layer], stream.source.layer(place.layer)[0].offset)
        assert self._reader is not None
        return self._reader.bring


def _in_host(held: Tensor, offset: int, extents: Sequence[Extent]) -> Generator[Tensor, None, None]:
    """Experts of a layer whose bytes are in host memory, as they lie in the file from `offset` on."""
    yield from (held[extent.offset - offset :] for extent in extents)
