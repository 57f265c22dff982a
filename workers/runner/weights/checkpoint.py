"""How does transformers load a checkpoint for us? Safetensors only, no remote code, nothing fetched, no weight made up."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.utils.quantization_config import Mxfp4Config

from ollm_service.core.plan import GenericModelKind
from workers.runner.interruptions import AttemptEnded

# None: the models of a family that are of no generic kind.
AUTO_CLASSES: Mapping[GenericModelKind | None, Any] = MappingProxyType(
    {
        GenericModelKind.CAUSAL_LM: AutoModelForCausalLM,
        GenericModelKind.SEQ2SEQ_LM: AutoModelForSeq2SeqLM,
        GenericModelKind.IMAGE_TEXT_TO_TEXT: AutoModelForImageTextToText,
        None: AutoModelForMultimodalLM,
    }
)


def load_checkpoint(folder: Path, kind: GenericModelKind | None, **where: Any) -> PreTrainedModel:
    """The model by its kind's plain Auto class, in the checkpoint's own dtype; `where` says where, as transformers names it.

    Raises AttemptEnded where a weight is missing: transformers would fill it with random numbers.
    """
    loaded: Any = AUTO_CLASSES[kind].from_pretrained(
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
