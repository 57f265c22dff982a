"""How would a job run on the fleet as it stands? The plan, what it needs and who could take it; nothing is stored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ollm_service.coordinator.fleet import Snapshot, absence, capable
from ollm_service.coordinator.rows import refuse_media
from ollm_service.core.catalog import CATALOG
from ollm_service.core.content import modalities_of
from ollm_service.core.errors import ModelNotFound, PlanNotExecutable
from ollm_service.core.labels import parse_expression
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import ModelModality
from ollm_service.core.planning import Planned, plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.reference import parse_reference
from ollm_service.core.requirements import Requirements, class_id, requirements_of
from ollm_service.store.jobs import NewRow
from ollm_service.store.views import WorkerView

MOST_MODELS_NAMED = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A plan and what follows from it on this fleet. `requirements` is None for a plan that is not executable."""

    planned: Planned
    config: RuntimeConfig
    requirements: Requirements | None
    fleet: Snapshot

    @property
    def class_id(self) -> str | None:
        """The class of the plan, where it has requirements."""
        return class_id(self.requirements) if self.requirements else None

    @property
    def capable_workers(self) -> tuple[WorkerView, ...]:
        """The workers that could take it."""
        return capable(self.requirements, self.fleet.workers) if self.requirements else ()

    @property
    def condition(self) -> str | None:
        """Why nobody can take it, None where somebody can. Who may fetch its model has to do that first."""
        if self.requirements is None or (self.requirements.download is None and self.capable_workers):
            return None
        return absence(self.requirements)

    @property
    def taken(self) -> frozenset[ModelModality]:
        """What rows may bring: text, and what the model takes besides where its processor is used; all where it is unknown."""
        if not self.config.multimodal:
            return frozenset({ModelModality.TEXT})
        resolved = self.planned.plan.resolved_model
        is_unknown = self.planned.profile is None and resolved.catalog_entry is None
        return frozenset(ModelModality if is_unknown else resolved.capabilities.modalities)

    def demand_executable(self) -> Requirements:
        """What the plan needs. Raises PlanNotExecutable with the plan's reason."""
        if self.requirements is None:
            raise PlanNotExecutable(
                self.planned.plan.reason, param="model", remedy="Change the runtime options, or name another model."
            )
        return self.requirements


def draft(fleet: Snapshot, model: str, config: RuntimeConfig, where: str | None, *, preferred_digest: str | None = None) -> Draft:
    """Plan a model reference against the fleet; `preferred_digest` decides between several models of one name.

    Raises InvalidReference, InvalidExpression, InvalidOption, ModelNotFound, and PlanNotExecutable where every folder of that
    name was refused as unsafe.
    """
    if where is not None:
        parse_expression(where)
    try:
        planned = plan(model, fleet.models, config, preferred_digest=preferred_digest)
    except ModelNotFound as unknown:
        _raise_if_unsafe(model, fleet.workers)
        raise ModelNotFound(unknown.message, param=unknown.param, remedy=_known_models(fleet)) from unknown
    is_executable = planned.plan.is_executable()
    requirements = requirements_of(planned.plan, planned.profile, config, where=where) if is_executable else None
    return Draft(planned=planned, config=config, requirements=requirements, fleet=fleet)


def draft_rows(
    fleet: Snapshot, model: str, config: RuntimeConfig, where: str | None, rows: Sequence[NewRow]
) -> tuple[Draft, list[NewRow]]:
    """The plan for these rows, and the rows as it takes them. Raises what `draft` does.

    Images or sounds in a row ask for `multimodal`, where the model has it; where not, such rows get an error and the others run.
    """
    drafted = draft(fleet, model, config, where)
    brought = {modality for row in rows for modality in modalities_of(row.request.get("messages"))}
    if brought and not config.multimodal:
        seeing = draft(fleet, model, replace(config, multimodal=True), where)
        drafted = drafted if seeing.requirements is None else seeing
    return drafted, refuse_media(rows, drafted.taken, model.strip())


def _known_models(fleet: Snapshot) -> str:
    if not fleet.workers:
        return "No worker is connected yet: start one, or wait until it is ready. Or name an alias or a hub id, org/name."
    nodes = {worker.worker_id: worker.node for worker in fleet.workers}
    held: dict[str, set[str]] = {}
    for model in fleet.models:
        held.setdefault(model.profile.name, set()).update(nodes[worker] for worker in model.workers if worker in nodes)
    on_fleet = [f"{name} (on {', '.join(sorted(held[name]))})" for name in sorted(held)]
    shown = [*on_fleet[:MOST_MODELS_NAMED], "…"] if len(on_fleet) > MOST_MODELS_NAMED else on_fleet or ["none"]
    return f"On the fleet: {', '.join(shown)}. Aliases: {', '.join(CATALOG)}. Or name a hub id, org/name."


def _raise_if_unsafe(model: str, workers: Iterable[WorkerView]) -> None:
    """A folder that somebody has and refuses deserves its reason, not `unknown`."""
    parsed = parse_reference(model)
    names = {parsed.directory_name, (parsed.local_path or parsed.identifier).removeprefix("./")}
    refusals = sorted({f"{worker.node}: {held.unsafe_because}" for worker in workers for held in _refused(worker, names)})
    if refusals:
        raise PlanNotExecutable(
            f"`{parsed.raw}` is refused by every worker that has it ({'; '.join(refusals)}).",
            param="model",
            remedy="Put a complete folder with safetensors weights in its place; pickled weights are never loaded.",
        )


def _refused(worker: WorkerView, names: set[str]) -> list[ModelProfile]:
    models = worker.capabilities.models
    return [held for held in models if not held.is_usable and (held.name in names or held.path.as_posix() in names)]
