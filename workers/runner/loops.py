"""Which loop answers a plan's rows? That depends on how the model takes its prompts."""

from collections.abc import Callable
from functools import partial

from ollm_service.core.packing import runs_in_packs
from workers.runner.encoder_decoder import EncoderDecoderLoop
from workers.runner.model import LoadedModel
from workers.runner.own_generate import OwnGenerateLoop
from workers.runner.packed.loop import PackedLoop
from workers.runner.padded import PaddedLoop


def loop_for(model: LoadedModel, backend_id: str | None, *, tries_ahead: bool = True) -> Callable[..., PackedLoop | PaddedLoop]:
    """In packs where the model can, else side by side, as its kind has it. Without `tries_ahead` packs give one token a pass."""
    if model.has_encoder:
        return EncoderDecoderLoop
    if model.feeds_itself:
        return OwnGenerateLoop
    if not runs_in_packs(model.module.config.model_type, backend_id):
        return PaddedLoop
    return partial(PackedLoop, tries_ahead=tries_ahead)
