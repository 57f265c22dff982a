"""Where are the grid's models, made when first asked for, and what does a supervisor send to have a cell carried out?"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ollm_service.core.leasing import WorkRow
from ollm_service.core.plan import PassId, RuntimePlan
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.resolution import HeldModel
from ollm_service.core.wire import Execute
from ollm_service.inspection import DigestCache, inspect_models
from tests.exactness.cells import CHUNK_ROWS, Cell
from tests.exactness.families import save
from tests.runner.commands import make_command, make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFolder:
    """A model on disk, and what inspection says of it."""

    folder: Path
    profile: ModelProfile


@dataclass(frozen=True, slots=True)
class Shelf:
    """Models in folders of their own, and the extents of those that were streamed, for all tests of a process."""

    root: Path
    _held: dict[Path, HeldFolder] = field(default_factory=dict)

    def model(self, family: str, *, seed: int = 0) -> HeldFolder:
        """The family's model in float32; other seeds are other weights."""
        models = self.root / f"{family}-{seed}"
        if models not in self._held:
            self._hold(models, save(family, models / family, seed=seed))
        return self._held[models]

    def bfloat16_model(self, family: str) -> HeldFolder:
        """The family's model in bfloat16. Its tokens ask every expert."""
        models = self.root / f"{family}-bfloat16"
        if models not in self._held:
            self._hold(models, save(family, models / family, dtype=torch.bfloat16, asks_all_experts=True))
        return self._held[models]

    def _hold(self, models: Path, folder: Path) -> None:
        (profile,) = inspect_models(models, DigestCache())
        self._held[models] = HeldFolder(folder=folder, profile=profile)

    def command(self, model: HeldFolder, cell: Cell, rows: Sequence[WorkRow], cache_dir: Path) -> Execute:
        """Answer the rows as the cell says."""
        command = make_command(
            model.folder,
            rows,
            micro_batch=cell.batch,
            kv=cell.kv,
            cache_dir=cache_dir,
            disk_layers=cell.residency.disk_layers(model.profile.layer_count),
        )
        return replace(
            command,
            runtime_plan=planned(model.profile, cell),
            profile=model.profile,
            config=cell.config,
            weights_dir=str(self.root / "weights"),
        )


def planned(profile: ModelProfile, cell: Cell) -> RuntimePlan:
    """The planner's plan. Where it plans no such passes for the family, one that names them: the engine can all the same."""
    found = plan(f"path:{profile.name}", [HeldModel(profile=profile, workers=("grid",))], cell.config).plan
    if found.backend_id is not None and set(cell.acting) <= set(found.specialization_pass_ids):
        return found
    return by_hand(profile, cell)


def by_hand(profile: ModelProfile, cell: Cell) -> RuntimePlan:
    """A plan of the passes that the cell is about."""
    return make_plan(profile.name, cell.acting, CHUNK_ROWS if PassId.MLP_CHUNKING in cell.extra else None)
