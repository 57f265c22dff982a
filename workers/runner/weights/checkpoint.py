"""How does transformers load a checkpoint for us? Safetensors only, no remote code, nothing fetched, no weight made up."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from workers.runner.interruptions import AttemptEnded


def load_checkpoint(folder: Path, **where: Any) -> PreTrainedModel:
    """The model in the checkpoint's own dtype; `where` says on which device, as transformers names it.

    Raises AttemptEnded where a weight is missing: transformers would fill it with random numbers.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        quantization_config=_unpacking(folder),
        **where,
    )
    module: PreTrainedModel
    module, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        raise AttemptEnded(
            stage="loading",
            code="weights_missing",
            message=f"The checkpoint lacks {len(absent)} of the model's weights, such as {absent[0]}.",
            error_type="MissingWeights",
        )
    return module


def _unpacking(folder: Path) -> Mxfp4Config | None:
    """How packed weights become plain ones: this runner has no kernels for mxfp4, and the profile counts it unpacked."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    scheme: Any = getattr(config, "quantization_config", None)
    is_packed = isinstance(scheme, dict) and scheme.get("quant_method") == "mxfp4"
    return Mxfp4Config(dequantize=True) if is_packed else None
