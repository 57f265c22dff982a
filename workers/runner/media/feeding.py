"""What do rows bring besides their tokens, as a forward pass takes it?"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workers.runner.prompts import EncodedRow

# What says where images stand is the row's own affair where rows share a pack.
FEATURES = ("pixel_values", "input_features")


def placeholder_of(module: PreTrainedModel) -> int | None:
    """The token in whose place a forward pass puts what it makes of images and sounds, if the model has one."""
    names = ("image_token_id", "image_token_index", "audio_token_id")
    return next((value for name in names if isinstance(value := getattr(module.config, name, None), int)), None)


def features_of(rows: Sequence[EncodedRow], module: PreTrainedModel) -> dict[str, Tensor]:
    """The images and sounds of rows in their order, on the model's device and in its dtype; nothing where there are none."""
    found = {name: [row.media[name] for row in rows if name in row.media] for name in FEATURES}
    return {name: _on_device(torch.cat(tensors), module) for name, tensors in found.items() if tensors}


def all_of(rows: Sequence[EncodedRow], module: PreTrainedModel) -> dict[str, Tensor]:
    """Everything that rows of equal shapes bring, joined."""
    return {name: _on_device(torch.cat([row.media[name] for row in rows]), module) for name in rows[0].media}


def _on_device(tensor: Tensor, module: PreTrainedModel) -> Tensor:
    return tensor.to(module.device, module.dtype if tensor.is_floating_point() else tensor.dtype)
