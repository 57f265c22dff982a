"""Which loop answers a plan's rows? That depends on how the model takes its prompts."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ollm_service.core.packing import runs_in_packs
from workers.runner.encoder_decoder import EncoderDecoderLoop
from workers.runner.model import LoadedModel
from workers.runner.own_generate import OwnGenerateLoop
from workers.runner.packed.loop import PackedLoop
from workers.runner.padded import PaddedLoop


def loop_for(model: LoadedModel, backend_id: str | None, **of_packs: Any) -> Callable[..., PackedLoop | PaddedLoop]:
    """In packs where the model can, with these options of theirs; else side by side, as its kind has it."""
    if model.has_encoder:
        return EncoderDecoderLoop
    if model.feeds_itself:
        return OwnGenerateLoop
    if not runs_in_packs(model.module.config.model_type, backend_id):
        return PaddedLoop
    return partial(PackedLoop, **of_packs)
