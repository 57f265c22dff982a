"""What does a plan need beside its model, and has this worker it? An adapter, and a model that guesses tokens.

Both are named by their place in the models root. A worker that lacks one leaves the plan to others.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ollm_service.core.adapters import Adapter
from ollm_service.core.capabilities import LiveState
from ollm_service.core.draft_model import NoDraftModel, beside_draft, draft_among, draft_bytes
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.placement import RowBounds
from ollm_service.core.profile import ModelProfile
from ollm_service.core.reference import inner_path
from ollm_service.inspection import inspect_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """What there is of it. `models_dir` is this worker's models root."""

    models_dir: Path
    adapter: Adapter | None = None
    draft: ModelProfile | None = None

    @property
    def draft_dir(self) -> str | None:
        """Where the draft lies on this host."""
        return None if self.draft is None else str((self.models_dir / self.draft.path).absolute())

    @property
    def draft_digest(self) -> str | None:
        """Which draft it is."""
        return None if self.draft is None else self.draft.digest

    def device_bytes(self, device_id: str, bounds: RowBounds) -> int:
        """What a device has to hold of it beside a model that answers such rows."""
        return 0 if self.draft is None else draft_bytes(self.draft, device_id, bounds)

    def beside(self, live: LiveState, bounds: RowBounds) -> LiveState:
        """What is free for the model then."""
        return beside_draft(live, self.draft, bounds)


def companions_here(models_dir: Path, models: Iterable[ModelProfile], config: RuntimeConfig) -> Companions:
    """What the options name, as this worker has it. Raises FileNotFoundError, saying what is missing, and BrokenCheckpoint."""
    adapter = None
    if config.adapter_dir is not None:
        path = PurePosixPath(inner_path(config.adapter_dir, raw=config.adapter_dir, param="adapter_dir"))
        try:
            adapter = inspect_adapter(models_dir, path)
        except FileNotFoundError as absent:
            raise FileNotFoundError(f"the adapter {absent}") from absent
    try:
        draft = draft_among(models, config)
    except NoDraftModel as absent:
        raise FileNotFoundError(str(absent)) from absent
    return Companions(models_dir=models_dir, adapter=adapter, draft=draft)
