"""What do rows bring besides their tokens, as a forward pass takes it?"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from workers.runner.prompts import EncodedRow

# What says where images stand is the row's own affair where rows share a pack.
FEATURES = ("pixel_values", "input_features")


def placeholder_of(module: PreTrainedModel) -> int | None:
    """The token in whose place a forward pass puts what it makes of images and sounds, if the model has one."""
    names = ("image_token_id", "image_token_index", "audio_token_id")
    return next((value for name in names if isinstance(value := getattr(module.config, name, None), int)), None)


def features_of(rows: Sequence[EncodedRow], module: PreTrainedModel) -> dict[str, Tensor]:
    """The images and sounds of rows in their order, on the model's device and in its dtype; nothing where there are none."""
    return _joined(rows, module, FEATURES)


def all_of(rows: Sequence[EncodedRow], module: PreTrainedModel) -> dict[str, Tensor]:
    """Everything that rows of equal shapes bring, joined."""
    return _joined(rows, module, [] if rows[0].media is None else [name for name, _ in rows[0].media.shapes])


@contextmanager
def one_at_a_time(module: PreTrainedModel) -> Iterator[None]:
    """Have towers compute one image or chunk of sound after the other: the memory for many is then that for one."""
    found: list[Any] = [module.get_encoder(modality=modality) for modality in ("image", "audio")]
    # Where there is no tower, transformers gives the model itself.
    towers = [tower for tower in found if tower not in (module, module.base_model)]
    for tower in towers:
        tower.forward = _for_each_item(tower.forward)
    try:
        yield
    finally:
        for tower in towers:
            del tower.forward  # the class has its own


def _for_each_item(forward: Callable[..., Any]) -> Callable[..., Any]:
    def states(*inputs: Tensor, **named: Any) -> Any:
        features = inputs[0] if inputs else named.pop(next(name for name in FEATURES if name in named))
        found = [forward(item, **named).last_hidden_state for item in features.split(1)]
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat(found))

    return states


def _joined(rows: Sequence[EncodedRow], module: PreTrainedModel, names: Collection[str]) -> dict[str, Tensor]:
    """What rows bring of these names, read now, on the device one after the other."""
    found: dict[str, list[Tensor]] = {}
    for media in [row.media for row in rows if row.media is not None]:
        for name, tensor in media.read().items():
            if name in names:
                found.setdefault(name, []).append(_on_device(tensor, module))
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def _on_device(tensor: Tensor, module: PreTrainedModel) -> Tensor:
    return tensor.to(module.device, module.dtype if tensor.is_floating_point() else tensor.dtype)
