"""What does a draft model, which guesses tokens for another, ask of a worker: that it is there, and memory beside that other."""

from collections.abc import Iterable
from dataclasses import replace

from ollm_service.core.capabilities import LiveState
from ollm_service.core.estimates import estimate_memory
from ollm_service.core.layout import Layout
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.packing import MOST_DRAFTED_ROWS
from ollm_service.core.placement import RowBounds
from ollm_service.core.profile import ModelProfile
from ollm_service.core.reference import inner_path


class NoDraftModel(Exception):
    """The draft that a job names is not among a worker's models; says which."""


def draft_among(models: Iterable[ModelProfile], config: RuntimeConfig) -> ModelProfile | None:
    """The draft that the options name by its place in the models root, None where they name none. Raises NoDraftModel."""
    if config.draft_model is None:
        return None
    path = inner_path(config.draft_model, raw=config.draft_model, param="draft_model")
    found = next((model for model in models if str(model.path) == str(path)), None)
    if found is None:
        raise NoDraftModel(f"the draft model {config.draft_model} is not in this worker's models folder")
    return found


def draft_bytes(profile: ModelProfile, device_id: str, bounds: RowBounds) -> int:
    """What a draft takes of a device beside the model for which it guesses."""
    layout = Layout(device_kind=device_id.partition(":")[0], is_sampled=False, is_packed=True, may_share=False)
    rows = MOST_DRAFTED_ROWS if bounds.count is None else min(bounds.count, MOST_DRAFTED_ROWS)
    needed = estimate_memory(profile, layout, rows=rows, tokens=bounds.longest)
    return needed.device_bytes - needed.workspace


def beside_draft(live: LiveState, draft: ModelProfile | None, bounds: RowBounds) -> LiveState:
    """What a worker has free for the model for which the draft guesses."""
    if draft is None:
        return live
    free = {device_id: size - draft_bytes(draft, device_id, bounds) for device_id, size in live.device_free_bytes.items()}
    return replace(live, device_free_bytes=free)
