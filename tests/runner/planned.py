"""What does a worker send for a model of a models root? Inspected, planned and written as the service does it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.resolution import HeldModel
from ollm_service.core.wire import Execute
from ollm_service.inspection import DigestCache, inspect_models
from tests.runner.commands import make_command


def profile_of(folder: Path) -> ModelProfile:
    """What inspection says of one folder of a models root, which it must not refuse."""
    (found,) = inspect_models(folder.parent, DigestCache(), is_wanted=lambda held: held.name == folder.name)
    assert found.unsafe_because is None
    return found


def planned_command(
    folder: Path,
    rows: Sequence[WorkRow],
    config: RuntimeConfig | None = None,
    *,
    micro_batch: int = 8,
    kv: KVCacheStrategy = KVCacheStrategy.RESIDENT,
    cache_dir: Path | None = None,
    disk_layers: tuple[int, ...] = (),
) -> Execute:
    """Execute these rows with the plan that the service makes for the model in this folder."""
    config, profile = config or RuntimeConfig(), profile_of(folder)
    found = plan(f"path:{folder.name}", [HeldModel(profile=profile, workers=("w",))], config).plan
    assert found.is_executable(), found.reason
    command = make_command(folder, rows, micro_batch=micro_batch, kv=kv, cache_dir=cache_dir, disk_layers=disk_layers)
    return replace(command, runtime_plan=found, profile=profile, config=config)
