"""What becomes of a RuntimePlan once a worker has tried it: applied, or a fallback, or neither?"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ollm_service.core.options import RuntimeConfig
from ollm_service.core.passes import Applied, Failed, PassOutcome, describe
from ollm_service.core.plan import BackendId, PassId, RuntimePlan, SpecializationState, SupportLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class CannotFallBack:
    """Why the generic backend may not take over; the attempt fails with the pass's own error."""

    reason: str


def finalize(plan: RuntimePlan, outcomes: Mapping[PassId, PassOutcome], details: Mapping[str, str]) -> RuntimePlan:
    """The plan as it really ran. `details` are what placement and loading add.

    Raises ValueError unless the outcomes account for every planned pass exactly, none of them as failed: a failed pass leads to
    `fall_back` or to a failed attempt, never here.
    """
    if plan.specialization_state is not SpecializationState.PLANNED:
        if outcomes:
            raise ValueError("a plan without planned passes has no outcomes")
        return plan.evolve(details={**plan.details, **details})
    missing = [pass_id for pass_id in plan.specialization_pass_ids if pass_id not in outcomes]
    if missing or len(outcomes) != len(plan.specialization_pass_ids):
        raise ValueError(f"every planned pass ends exactly once; unaccounted for: {', '.join(missing) or 'extra passes'}")
    if any(isinstance(outcome, Failed) for outcome in outcomes.values()):
        raise ValueError("a plan with a failed pass is not applied")
    applied = tuple(pass_id for pass_id in plan.specialization_pass_ids if isinstance(outcomes[pass_id], Applied))
    return plan.evolve(
        specialization_applied=True,
        specialization_state=SpecializationState.APPLIED,
        applied_specialization_pass_ids=applied,
        details={
            **plan.details,
            **details,
            **_outcome_details(outcomes),
            "applied_specialization_pass_ids": ",".join(applied),
            "planned_pass_count": str(len(plan.specialization_pass_ids)),
            "applied_pass_count": str(len(applied)),
        },
    )


def fall_back(
    plan: RuntimePlan,
    config: RuntimeConfig,
    outcomes: Mapping[PassId, PassOutcome],
    *,
    reason: str,
    error_type: str,
    demanded: Iterable[PassId],
) -> RuntimePlan | CannotFallBack:
    """The same model on the generic backend, keeping what was planned and why it could not be had.

    Only a native plan that nobody insisted on, and that has not been applied, may fall back: no explicit backend, a known kind,
    no offload, and nothing demanded that the generic backend lacks.
    """
    demanded = tuple(demanded)
    if plan.specialization_state is not SpecializationState.PLANNED:
        return CannotFallBack(reason=f"the plan's passes are {plan.specialization_state}")
    if plan.backend_id != BackendId.OPTIMIZED_NATIVE:
        return CannotFallBack(reason="only the optimized-native backend falls back")
    if config.backend is not None:
        return CannotFallBack(reason=f"backend `{config.backend}` was asked for")
    if plan.generic_model_kind is None:
        return CannotFallBack(reason="the model's kind is not known")
    if config.offload_cpu_layers or config.offload_gpu_layers:
        return CannotFallBack(reason="offload was asked for, which the generic backend has not")
    if demanded:
        return CannotFallBack(reason=f"{', '.join(demanded)} was asked for, which the generic backend has not")
    return plan.evolve(
        backend_id=BackendId.TRANSFORMERS_GENERIC,
        support_level=SupportLevel.GENERIC,
        supports_disk_cache=False,
        supports_cpu_offload=False,
        supports_gpu_offload=False,
        specialization_applied=False,
        specialization_state=SpecializationState.FALLBACK,
        applied_specialization_pass_ids=(),
        fallback_reason=reason,
        reason=f"Fell back to {BackendId.TRANSFORMERS_GENERIC}: {reason}",
        details={
            **plan.details,
            **_outcome_details(outcomes),
            "fallback_from_backend_id": BackendId.OPTIMIZED_NATIVE,
            "fallback_error_type": error_type,
            "fallback_provider_id": plan.specialization_provider_id or "",
        },
    )


def _outcome_details(outcomes: Mapping[PassId, PassOutcome]) -> dict[str, str]:
    return {f"pass_{pass_id.value.replace('-', '_')}": describe(outcome) for pass_id, outcome in outcomes.items()}
