"""cpu-offload and gpu-offload: layers that do not stay on the device pass through it, from host memory or from disk.

Which layers those are was decided by the placement; the model was loaded without them. The two passes differ in who decides: the
placement by what fits and a policy, or the user by how many layers stay on the GPU.
"""

from collections.abc import Mapping, Sequence

from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.requirements import demanded_passes
from ollm_service.core.wire import Execute
from workers.runner.model import LoadedModel


class LayerOffload:
    """The pass. Evidence: the layers, by number, that real forward passes were brought, and the bytes read for them."""

    def __init__(self, pass_id: PassId, model: LoadedModel, command: Execute) -> None:
        self.pass_id = pass_id
        self._placement = command.placement
        self._has_been_told = command.config.offload_gpu_layers > 0
        keeps_all = 0 < command.profile.layer_count <= command.config.offload_gpu_layers
        self._is_demanded = pass_id in demanded_passes(command.runtime_plan, command.config) and not keeps_all
        self._stream = model.stream
        self._brought_before = self._read_before = self._rows_before = self._tiles_before = 0

    def check(self) -> PassOutcome | None:
        """Not needed where all layers stay on the device, or where the other of the two passes brings them."""
        if not self._placement.host_layers and not self._placement.disk_layers:
            if self._is_demanded:
                return Failed(reason="layers were to leave the device, and all were placed on it", error_type="NotPlaced")
            return NotNeeded(reason="no layer to offload")
        if self._has_been_told != (self.pass_id is PassId.GPU_OFFLOAD):
            return NotNeeded(reason="the layers are brought by the other offload pass")
        if self._stream is None:
            return Failed(reason="the model was loaded whole", error_type="NothingToBring")
        return None

    def apply(self) -> None:
        """From now on every forward pass is brought the layers that it lacks."""
        assert self._stream is not None
        self._brought_before, self._read_before = self._stream.layers_brought, self._stream.source.bytes_read
        self._rows_before, self._tiles_before = self._stream.rows_looked_up, self._stream.tiles_brought
        self._stream.open()

    def evidence(self) -> PassOutcome:
        """Applied with the layers and bytes; failed where no forward pass went through one."""
        if self._brought == 0:
            return Failed(reason="no forward pass was brought a layer", error_type="NoEvidence")
        host, disk = self._placement.host_layers, self._placement.disk_layers
        parts = [f"layers {_ranges(host)} in host memory"] if host else []
        parts += [f"layers {_ranges(disk)} from disk"] if disk else []
        found = f"{', '.join(parts)}; brought {self._brought:,} times, {self._bytes_read:,} bytes read"
        if self._placement.vocabulary_on_disk:
            found += f"; vocabulary from disk: {self._rows:,} rows looked up, {self._tiles:,} tiles of the head"
        return Applied(evidence=found)

    def undo(self) -> None:
        """Stop reading; the layers are without weights again."""
        if self._stream is not None:
            self._stream.close()

    def measured(self) -> Mapping[str, float]:
        """Layers brought, and bytes of weights read from disk since the model was loaded; rows and tiles of the vocabulary."""
        brought = {"layers_brought": float(self._brought), "weight_bytes_read": float(self._bytes_read)}
        if not self._placement.vocabulary_on_disk:
            return brought
        return {**brought, "vocabulary_rows_read": float(self._rows), "head_tiles_brought": float(self._tiles)}

    @property
    def _brought(self) -> int:
        return 0 if self._stream is None else self._stream.layers_brought - self._brought_before

    @property
    def _bytes_read(self) -> int:
        return 0 if self._stream is None else self._stream.source.bytes_read - self._read_before

    @property
    def _rows(self) -> int:
        return 0 if self._stream is None else self._stream.rows_looked_up - self._rows_before

    @property
    def _tiles(self) -> int:
        return 0 if self._stream is None else self._stream.tiles_brought - self._tiles_before


def _ranges(layers: Sequence[int]) -> str:
    """`3`, `1-5`, `0, 3, 5-7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
