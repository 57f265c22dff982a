"""How is an adapter put on a model of ours? By peft, into the model's own instance; imported only where a plan names an adapter.

Every weight of the adapter has to find its place, and every place its weight: peft itself would leave either out in silence.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ollm_service.core.adapters import ADAPTER_WEIGHTS, Adapter
from workers.runner.interruptions import AttemptEnded, first_line


def put_on(module: PreTrainedModel, adapter: Adapter) -> None:
    """Put the adapter's layers into the model and load their weights. Raises AttemptEnded where they do not belong together."""
    try:
        config = PeftConfig.from_pretrained(adapter.folder)
        config.inference_mode = True
        config.base_model_name_or_path = None  # a place on the machine that trained it
        adapted = get_peft_model(module, config)
        weights = load_file(Path(adapter.folder, ADAPTER_WEIGHTS), device=str(module.device))
        wanted = {name: held.shape for name, held in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
        _refuse_other_shapes(wanted, weights)
        loaded: Any = set_peft_model_state_dict(adapted, weights)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OSError) as error:
        raise _refused(first_line(error), type(error).__name__) from error
    lacking, strange = sorted(wanted.keys() - weights.keys()), sorted(loaded.unexpected_keys)
    if lacking:
        raise _refused(f"it lacks {len(lacking)} of its weights, such as {lacking[0]}", "MissingWeights")
    if strange:
        raise _refused(f"the model has no place for {len(strange)} of its weights, such as {strange[0]}", "UnexpectedWeights")
    module.train(mode=False).requires_grad_(requires_grad=False)


def _refuse_other_shapes(wanted: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> None:
    for name, shape in wanted.items():
        if name in weights and weights[name].shape != shape:
            given = list(weights[name].shape)
            raise _refused(f"its {name} has the shape {given}, where the model has room for {list(shape)}", "OtherShape")


def _refused(why: str, error_type: str) -> AttemptEnded:
    return AttemptEnded(
        stage="loading",
        code="adapter_refused",
        message=f"The adapter cannot be put on this model: {why}. Name the model that it was trained on.",
        error_type=error_type,
        is_permanent=True,
    )
