"""How does transformers load a checkpoint for us? Safetensors only, no remote code, nothing fetched, no weight made up."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from ollm_service.core.errors import shown
from ollm_service.core.plan import GenericModelKind
from ollm_service.core.quantization import is_unpacked, quantization_of
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

# Where one of these were left over, transformers would have taken packed numbers for plain ones.
_PARTS_OF_PACKED = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "_blocks", "_scales"),
    *("qweight", "qzeros", ".scales", ".absmax", ".quant_map"),
)


def load_checkpoint(folder: Path, kind: GenericModelKind | None, **where: Any) -> PreTrainedModel:
    """The model by its kind's plain Auto class, in the checkpoint's own dtype; `where` says where, as transformers names it.

    Raises AttemptEnded where a weight is missing: transformers would fill it with random numbers.
    """
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    loaded: Any = AUTO_CLASSES[kind].from_pretrained(
        folder,
        config=_unpacking(config),
        dtype="auto",
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
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
    left = sorted(name for name in report["unexpected_keys"] if name.endswith(_PARTS_OF_PACKED))
    if left:
        raise AttemptEnded(
            stage="loading",
            code="weights_left_out",
            message=f"{len(left)} tensors of quantized weights find no use, such as {left[0]}: the numbers would be wrong.",
            error_type="UnusedWeights",
        )
    return module


def refuse_unknown_architecture(folder: Path, kind: GenericModelKind | None) -> None:
    """Raises AttemptEnded, before anything is loaded, for a model that this version of transformers has no classes for."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise _unknown("its config.json cannot be read", type(error).__name__) from error
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise _unknown(f"a model of type {shown(model_type)}", "UnknownArchitecture")
    if CONFIG_MAPPING[model_type] not in AUTO_CLASSES[kind]._model_mapping:
        raise _unknown(f"a model of type {shown(model_type)} that is {kind}", "UnknownArchitecture")


def _unknown(what: str, error_type: str) -> AttemptEnded:
    return AttemptEnded(
        stage="loading",
        code="architecture_unknown",
        message=f"transformers {transformers.__version__} knows no such model: {what}. It takes a worker with a later release.",
        error_type=error_type,
    )


def _unpacking(config: Any) -> Any:
    """The configuration, changed so that packed weights become plain ones where the profile counts them so.

    This runner has no kernels for mxfp4. Weights of compressed-tensors would be unpacked by the first forward pass anyway.
    """
    scheme: Any = getattr(config, "quantization_config", None)
    if isinstance(scheme, dict) and is_unpacked(quantization_of(scheme)):
        scheme["dequantize"] = True
    return config
