"""Which passes does `optimized-native` attach to a model, in which order? The planned ones, as the plan lists them."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from ollm_service.core.plan import BackendId, PassId
from ollm_service.core.wire import Execute
from workers.runner.model import LoadedModel
from workers.runner.passes.attention_replacement import AttentionReplacement
from workers.runner.passes.disk_cache import DiskCache
from workers.runner.passes.gds_export_weights import GdsExportWeights
from workers.runner.passes.layer_offload import LayerOffload
from workers.runner.passes.mlp_chunking import MlpChunking
from workers.runner.passes.moe_routing import MoeRouting
from workers.runner.passes.multimodal_shell import MultimodalShell
from workers.runner.passes.specialization import SpecializationPass

PASSES: Mapping[PassId, Callable[[LoadedModel, Execute], SpecializationPass]] = MappingProxyType(
    {
        PassId.DISK_CACHE: DiskCache,
        PassId.CPU_OFFLOAD: partial(LayerOffload, PassId.CPU_OFFLOAD),
        PassId.GPU_OFFLOAD: partial(LayerOffload, PassId.GPU_OFFLOAD),
        PassId.MLP_CHUNKING: MlpChunking,
        PassId.MULTIMODAL_SHELL: MultimodalShell,
        PassId.ATTENTION_REPLACEMENT: AttentionReplacement,
        PassId.MOE_ROUTING: MoeRouting,
        PassId.GDS_EXPORT_WEIGHTS: GdsExportWeights,
    }
)


def planned_passes(model: LoadedModel, command: Execute) -> list[SpecializationPass]:
    """The plan's passes for this model; none for a generic plan."""
    plan = command.runtime_plan
    if plan.backend_id != BackendId.OPTIMIZED_NATIVE:
        return []
    return [PASSES[pass_id](model, command) for pass_id in plan.specialization_pass_ids]
