"""gds-export-weights: layers that do not stay on the device are read from the raw export in the model's folder.

The model was loaded from the export already, which fails this pass where it is damaged or of another model; nothing is laid out
in the cache folder then.
"""

from collections.abc import Mapping

from ollm_service.core.gds_export import EXPORT_FOLDER
from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from workers.runner.model import LoadedModel
from workers.runner.weights.export import ExportedExtents


class GdsExportWeights:
    """The pass. Evidence: the bytes that were read from the export before and since the plan's passes were attached."""

    pass_id = PassId.GDS_EXPORT_WEIGHTS

    def __init__(self, model: LoadedModel, command: Execute) -> None:  # noqa: ARG002 - as every pass is made
        self._source = None if model.stream is None else model.stream.source
        self._read_before = 0 if self._source is None else self._source.bytes_read

    def check(self) -> PassOutcome | None:
        """Not needed where no layer comes from elsewhere; fails where the model was loaded from other files."""
        if self._source is None:
            return NotNeeded(reason="every layer is in memory; the safetensors files were loaded")
        if not isinstance(self._source, ExportedExtents):
            return Failed(reason="the weights were not loaded from the export", error_type="NotFromExport")
        return None

    def apply(self) -> None:
        """Nothing is to be changed: the weights come from the export already."""

    def evidence(self) -> PassOutcome:
        """Applied with the bytes; failed where nothing was read, neither while loading nor for a forward pass."""
        assert self._source is not None
        if self._source.bytes_read == 0:
            return Failed(reason="nothing was read from the export", error_type="NoEvidence")
        read = self._source.bytes_read - self._read_before
        return Applied(evidence=f"{read:,} bytes read from {EXPORT_FOLDER}, {self._read_before:,} while loading")

    def undo(self) -> None:
        """Nothing was changed."""

    def measured(self) -> Mapping[str, float]:
        """Bytes read from the export since the passes were attached."""
        return {"export_bytes_read": 0.0 if self._source is None else float(self._source.bytes_read - self._read_before)}
