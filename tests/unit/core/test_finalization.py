"""What becomes of a plan after a try: applied, a fallback, or neither?"""

from collections.abc import Mapping

import pytest

from ollm_service.core.finalization import CannotFallBack, fall_back, finalize
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome, describe
from ollm_service.core.plan import BackendId, PassId, RuntimePlan, SpecializationState, SupportLevel
from ollm_service.core.requirements import demanded_passes
from tests.unit.core.samples import gpt2, planned, runtime_plan

CHUNKS, BYTES = Applied(evidence="41 chunks"), Applied(evidence="1,024 bytes")
IDLE = NotNeeded(reason="no layer to offload")
BROKEN = Failed(reason="no gated MLP", error_type="KeyError")


def test_a_plan_whose_passes_took_effect_is_applied() -> None:
    """Applied ids are those with evidence, in planned order; the details hold how every pass ended."""
    plan = planned()
    outcomes: dict[PassId, PassOutcome] = {PassId.MLP_CHUNKING: CHUNKS, PassId.CPU_OFFLOAD: IDLE, PassId.DISK_CACHE: BYTES}
    found = finalize(plan, outcomes, {"device": "cpu"})
    assert found.specialization_state is SpecializationState.APPLIED
    assert found.specialization_applied
    assert found.applied_specialization_pass_ids == (PassId.DISK_CACHE, PassId.MLP_CHUNKING)
    assert found.fallback_reason is None
    assert dict(found.details) == {
        **plan.details,
        "device": "cpu",
        "pass_disk_cache": "applied(1,024 bytes)",
        "pass_cpu_offload": "not-needed(no layer to offload)",
        "pass_mlp_chunking": "applied(41 chunks)",
        "applied_specialization_pass_ids": "disk-cache,mlp-chunking",
        "planned_pass_count": "3",
        "applied_pass_count": "2",
    }


def test_a_pass_that_was_not_needed_is_accounted_for_but_not_applied() -> None:
    """The state is still `applied`: none failed."""
    outcomes: dict[PassId, PassOutcome] = {
        PassId.DISK_CACHE: NotNeeded(reason="the KV cache stayed resident"),
        PassId.CPU_OFFLOAD: IDLE,
        PassId.MLP_CHUNKING: CHUNKS,
    }
    found = finalize(planned(), outcomes, {})
    assert found.specialization_state is SpecializationState.APPLIED
    assert found.applied_specialization_pass_ids == (PassId.MLP_CHUNKING,)
    assert found.details["pass_disk_cache"] == "not-needed(the KV cache stayed resident)"
    none = finalize(planned(), dict.fromkeys(planned().specialization_pass_ids, NotNeeded(reason="nothing to do")), {})
    assert (none.specialization_applied, none.applied_specialization_pass_ids) == (True, ())


@pytest.mark.parametrize(
    ("outcomes", "problem"),
    [
        ({}, "disk-cache, cpu-offload, mlp-chunking"),
        ({PassId.DISK_CACHE: BYTES, PassId.CPU_OFFLOAD: IDLE}, "unaccounted for: mlp-chunking"),
        (
            {PassId.DISK_CACHE: BYTES, PassId.CPU_OFFLOAD: IDLE, PassId.MLP_CHUNKING: CHUNKS, PassId.MOE_ROUTING: CHUNKS},
            "extra passes",
        ),
        ({PassId.DISK_CACHE: BYTES, PassId.CPU_OFFLOAD: IDLE, PassId.MLP_CHUNKING: BROKEN}, "failed pass is not applied"),
    ],
)
def test_every_planned_pass_must_have_ended_well(outcomes: Mapping[PassId, PassOutcome], problem: str) -> None:
    """A pass that is missing, added or failed cannot be finalized as applied."""
    with pytest.raises(ValueError, match=problem):
        finalize(planned(), outcomes, {})


def test_a_plan_without_passes_is_finalized_with_its_details_alone() -> None:
    """A generic plan stays `not-planned` and takes no outcomes."""
    found = finalize(planned(model=gpt2()), {}, {"device": "cpu"})
    assert found.specialization_state is SpecializationState.NOT_PLANNED
    assert found.details["device"] == "cpu"
    with pytest.raises(ValueError, match="has no outcomes"):
        finalize(planned(model=gpt2()), {PassId.DISK_CACHE: BYTES}, {})


def fallen(plan: RuntimePlan, config: RuntimeConfig) -> RuntimePlan | CannotFallBack:
    """What follows when chunking fails under these options."""
    return fall_back(
        plan,
        config,
        {PassId.DISK_CACHE: NotNeeded(reason="not reached"), PassId.MLP_CHUNKING: BROKEN},
        reason="mlp-chunking: no gated MLP",
        error_type="KeyError",
        demanded=demanded_passes(plan, config),
    )


def test_an_undemanding_native_plan_falls_back_to_generic() -> None:
    """The generic backend takes over; what was planned, by whom, and why it could not be had stays on record."""
    plan = planned()
    found = fallen(plan, RuntimeConfig())
    assert isinstance(found, RuntimePlan)
    assert (found.backend_id, found.support_level) == (BackendId.TRANSFORMERS_GENERIC, SupportLevel.GENERIC)
    assert found.specialization_state is SpecializationState.FALLBACK
    assert found.specialization_enabled
    assert not found.specialization_applied
    assert not (found.supports_disk_cache)
    assert not (found.supports_cpu_offload)
    assert not (found.supports_gpu_offload)
    assert found.specialization_provider_id == "llama-native"
    assert found.specialization_pass_ids == plan.specialization_pass_ids
    assert found.applied_specialization_pass_ids == ()
    assert found.fallback_reason == "mlp-chunking: no gated MLP"
    assert "mlp-chunking" in found.reason
    assert dict(found.details) == {
        **plan.details,
        "pass_disk_cache": "not-needed(not reached)",
        "pass_mlp_chunking": "failed(no gated MLP)",
        "fallback_from_backend_id": "optimized-native",
        "fallback_error_type": "KeyError",
        "fallback_provider_id": "llama-native",
    }
    assert finalize(found, {}, {"device": "cpu"}).specialization_state is SpecializationState.FALLBACK


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (RuntimeConfig(backend="optimized-native"), "backend `optimized-native` was asked for"),
        (RuntimeConfig(kv_cache_strategy="paged"), "disk-cache was asked for"),
        (RuntimeConfig(kv_cache_window_tokens=9), "disk-cache was asked for"),
        (RuntimeConfig(strategy_selector_profile="bounded-window"), "disk-cache was asked for"),
        (RuntimeConfig(dense_projection_chunk_rows=9), "mlp-chunking was asked for"),
        (
            RuntimeConfig(kv_cache_strategy="paged", dense_projection_chunk_rows=9),
            "disk-cache, mlp-chunking was asked for",
        ),
    ],
)
def test_what_was_demanded_never_falls_back(config: RuntimeConfig, reason: str) -> None:
    """An explicit wish fails with the pass's own error rather than being dropped."""
    found = fallen(planned(config), config)
    assert isinstance(found, CannotFallBack)
    assert reason in found.reason


@pytest.mark.parametrize(
    "config",
    [RuntimeConfig(), RuntimeConfig(kv_cache_strategy="resident"), RuntimeConfig(strategy_selector_profile="capacity")],
)
def test_preferences_do_not_stand_in_the_way(config: RuntimeConfig) -> None:
    """Resident KV is what generic has, and a profile is a preference."""
    assert isinstance(fallen(planned(config), config), RuntimePlan)


@pytest.mark.parametrize(
    ("plan", "config", "reason"),
    [
        (planned(model=gpt2()), RuntimeConfig(), "passes are not-planned"),
        (runtime_plan(generic_model_kind=None), RuntimeConfig(), "kind is not known"),
        (runtime_plan(), RuntimeConfig(offload_cpu_layers=1), "offload was asked for"),
        (runtime_plan(), RuntimeConfig(offload_gpu_layers=1), "offload was asked for"),
        (runtime_plan(backend_id="someone-elses"), RuntimeConfig(), "only the optimized-native backend"),
        (
            runtime_plan(specialization_state=SpecializationState.APPLIED, specialization_applied=True),
            RuntimeConfig(),
            "passes are applied",
        ),
    ],
)
def test_only_a_native_plan_in_its_first_try_falls_back(plan: RuntimePlan, config: RuntimeConfig, reason: str) -> None:
    """A generic, unknown, offloading, foreign or already applied plan does not."""
    found = fallen(plan, config)
    assert isinstance(found, CannotFallBack)
    assert reason in found.reason


def test_outcomes_are_described_in_one_line() -> None:
    """Each of the three endings, as people and details see it."""
    assert describe(CHUNKS) == "applied(41 chunks)"
    assert describe(NotNeeded(reason="r")) == "not-needed(r)"
    assert describe(BROKEN) == "failed(no gated MLP)"
