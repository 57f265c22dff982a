"""What would a fleet plan whose workers have the models of one folder? Answered on this machine, with no service running.

The same computation as the service's, on what an inspection of the folder finds; who could run the plan, and when, is not known.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ollm_service.cli.embedded import check_models
from ollm_service.cli.options import Choices
from ollm_service.client import Preview
from ollm_service.configuration import read_options
from ollm_service.core.catalog import CATALOG
from ollm_service.core.errors import InvalidOption, ModelNotFound, PlanNotExecutable
from ollm_service.core.labels import parse_expression
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.planning import Planned, plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.reference import ModelReference, parse_reference
from ollm_service.core.requirements import class_id, requirements_of
from ollm_service.core.resolution import HeldModel, is_named
from ollm_service.core.wire import to_json
from ollm_service.inspection import DigestCache, inspect_models, list_models

ONE_WORKER = ("here",)


def preview_offline(models_dir: Path, model: str, choices: Choices, *, where: str | None) -> Preview:
    """The plan of a model of the folder, in the shape that the service gives, without workers, placement and quote.

    Of the folder that is named alone anything is read, and new weights once as a whole, for their digest. Raises InvalidOption,
    InvalidReference, InvalidExpression and ModelNotFound, PlanNotExecutable for a folder that is refused as unsafe, and
    MisconfiguredService.
    """
    layers = read_options(os.environ)
    config = layers.runtime_config(choices.runtime)
    layers.generation_config(choices.generation)
    parsed = parse_reference(model)  # before anything is read
    if where is not None:
        parse_expression(where)
    problem = check_models(models_dir)
    if problem is not None:
        raise InvalidOption("--models-dir", problem)
    names = [place.name for place in list_models(models_dir)]
    found = inspect_models(models_dir, DigestCache(_known_digests()), is_wanted=lambda place: is_named(place, parsed))
    planned = _plan(parsed, found, names, config)
    requirements = None
    if planned.plan.is_executable():
        requirements = requirements_of(planned.plan, planned.profile, config, where=where)
    as_planned = planned.plan.as_dict()
    return Preview.from_raw(
        {
            "object": "plan.preview",
            "id": None,
            "model": model,
            "plan": as_planned,
            "placement": None,
            "quote": None,
            "executable": planned.plan.is_executable(),
            "runtime_plan": as_planned,
            "resolved_model": to_json(planned.plan.resolved_model),
            "requirements": requirements.as_dict() if requirements else None,
            "class_id": class_id(requirements) if requirements else None,
            "condition": None,
            "workers": [],
            "rows": None,
        }
    )


def _plan(parsed: ModelReference, found: Sequence[ModelProfile], names: Sequence[str], config: RuntimeConfig) -> Planned:
    held = [HeldModel(profile=profile, workers=ONE_WORKER) for profile in found if profile.is_usable]
    try:
        return plan(parsed.raw, held, config)
    except ModelNotFound as unknown:
        for profile in found:
            if profile.unsafe_because is not None:
                raise PlanNotExecutable(f"`{parsed.raw}` is refused: {profile.unsafe_because}.", param="model") from unknown
        here = ", ".join(sorted(names)) or "none"
        raise ModelNotFound(
            f"The folder has no model named `{parsed.raw}`.",
            param="model",
            remedy=f"In it: {here}. Aliases: {', '.join(CATALOG)}. Or name a hub id, org/name.",
        ) from unknown


def _known_digests() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "ollm-service" / "digests.json"
