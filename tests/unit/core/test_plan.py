"""Is a RuntimePlan exactly what others rely on, and can a contradictory one not be built?"""

import dataclasses
import json
from pathlib import PurePosixPath
from typing import Any

import pytest

from ollm_service.core.plan import (
    BackendId,
    CapabilityProfile,
    GenericModelKind,
    ModelModality,
    ModelSourceKind,
    NativeFamily,
    PassId,
    ResolvedModel,
    RuntimePlan,
    SpecializationState,
    SupportLevel,
)
from tests.unit.core.samples import resolved, runtime_plan

ATTRIBUTES = [
    "resolved_model",
    "backend_id",
    "model_path",
    "support_level",
    "generic_model_kind",
    "supports_disk_cache",
    "supports_cpu_offload",
    "supports_gpu_offload",
    "specialization_enabled",
    "specialization_applied",
    "specialization_provider_id",
    "specialization_state",
    "reason",
    "specialization_pass_ids",
    "applied_specialization_pass_ids",
    "fallback_reason",
    "details",
]
GENERIC: dict[str, Any] = {
    "backend_id": BackendId.TRANSFORMERS_GENERIC,
    "specialization_enabled": False,
    "specialization_provider_id": None,
    "specialization_state": SpecializationState.NOT_PLANNED,
    "specialization_pass_ids": (),
}


def test_a_plan_has_exactly_its_17_attributes() -> None:
    """The attributes and their order are pinned."""
    assert [item.name for item in dataclasses.fields(RuntimePlan)] == ATTRIBUTES


def test_as_dict_has_every_attribute_but_the_resolved_model() -> None:
    """The dictionary has the 16 keys, holds JSON types alone, and names enums by their values."""
    plan = runtime_plan(details={"a": "b"})
    assert list(plan.as_dict()) == ATTRIBUTES[1:]
    assert plan.as_dict() == json.loads(json.dumps(plan.as_dict()))
    assert plan.as_dict()["specialization_pass_ids"] == ["disk-cache", "mlp-chunking"]
    assert (plan.as_dict()["model_path"], plan.as_dict()["generic_model_kind"]) == ("tiny-llama", "causal-lm")


def test_capability_profile_emits_all_seven_fields() -> None:
    """The capability profile's dictionary is pinned too."""
    assert CapabilityProfile(support_level=SupportLevel.GENERIC).as_dict() == {
        "support_level": "generic",
        "modalities": ["text"],
        "requires_processor": False,
        "supports_disk_cache": True,
        "supports_local_materialization": False,
        "supports_specialization": False,
        "details": {},
    }


@pytest.mark.parametrize(
    ("enumeration", "values"),
    [
        (SpecializationState, ["not-planned", "planned", "applied", "fallback"]),
        (SupportLevel, ["optimized", "generic", "unsupported"]),
        (GenericModelKind, ["causal-lm", "image-text-to-text", "seq2seq-lm"]),
        (ModelModality, ["text", "image", "audio"]),
        (ModelSourceKind, ["builtin", "hugging-face", "local-path", "opaque"]),
        (NativeFamily, ["llama", "gemma3", "gpt-oss", "qwen3-next", "voxtral"]),
        (BackendId, ["optimized-native", "transformers-generic"]),
        (
            PassId,
            [
                "disk-cache",
                "cpu-offload",
                "gpu-offload",
                "mlp-chunking",
                "moe-routing",
                "attention-replacement",
                "multimodal-shell",
                "gds-export-weights",
            ],
        ),
    ],
)
def test_enumerations_have_exactly_their_values(enumeration: type[Any], values: list[str]) -> None:
    """Names that stand in stored plans never change."""
    assert [member.value for member in enumeration] == values


def test_a_plan_is_executable_if_it_names_a_backend() -> None:
    """No backend, not executable."""
    assert runtime_plan().is_executable()
    assert not runtime_plan(**(GENERIC | {"backend_id": None})).is_executable()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"specialization_applied": True}, "must agree"),
        ({"specialization_state": SpecializationState.APPLIED}, "must agree"),
        ({"specialization_provider_id": None}, "needs a specialization provider"),
        (
            {
                "specialization_provider_id": None,
                "specialization_state": SpecializationState.FALLBACK,
                "fallback_reason": "x",
            },
            "needs a specialization provider",
        ),
        ({"specialization_state": SpecializationState.FALLBACK}, "fallback_reason"),
        ({"fallback_reason": "x"}, "fallback_reason"),
        ({"applied_specialization_pass_ids": (PassId.DISK_CACHE,)}, "names applied passes"),
        (
            {
                "specialization_state": SpecializationState.APPLIED,
                "specialization_applied": True,
                "applied_specialization_pass_ids": (PassId.MOE_ROUTING,),
            },
            "planned ones",
        ),
        (
            {
                "specialization_state": SpecializationState.APPLIED,
                "specialization_applied": True,
                "applied_specialization_pass_ids": (PassId.MLP_CHUNKING, PassId.DISK_CACHE),
            },
            "in planned order",
        ),
        ({"specialization_pass_ids": (PassId.DISK_CACHE, PassId.DISK_CACHE)}, "planned twice"),
        ({"specialization_pass_ids": ("turbo",)}, "not a valid PassId"),
        ({"specialization_state": SpecializationState.NOT_PLANNED}, "plans no passes"),
        (GENERIC | {"specialization_enabled": True}, "does not enable it"),
        ({"backend_id": None}, "without a backend"),
    ],
)
def test_contradictory_plans_cannot_be_built(changes: dict[str, Any], problem: str) -> None:
    """Every invariant is checked at construction, and again whenever a plan is changed."""
    with pytest.raises(ValueError, match=problem):
        runtime_plan(**changes)
    with pytest.raises(ValueError, match=problem):
        runtime_plan().evolve(**changes)


def test_details_are_a_copy_and_read_only() -> None:
    """Nobody can change a plan through the map that it was made from, nor through its own."""
    details = {"a": "b"}
    plan = runtime_plan(details=details)
    details["a"] = "c"
    assert plan.details["a"] == "b"
    with pytest.raises(TypeError):
        plan.details["a"] = "d"  # type: ignore[index]  # the point of the test
    plan.as_dict()["details"]["a"] = "e"
    assert plan.details["a"] == "b"


def test_pass_ids_may_be_given_as_text() -> None:
    """Lists of texts, as JSON has them, become tuples of pass ids."""
    plan = runtime_plan(specialization_pass_ids=["disk-cache"])
    assert plan.specialization_pass_ids == (PassId.DISK_CACHE,)


def test_a_plan_is_rebuilt_from_its_dictionary() -> None:
    """`from_dict(as_dict())` is the plan again, nulls included."""
    for plan in (runtime_plan(details={"a": "b"}), runtime_plan(**GENERIC, model_path=None, generic_model_kind=None)):
        assert RuntimePlan.from_dict(plan.as_dict(), resolved_model=plan.resolved_model) == plan


def test_a_broken_dictionary_is_refused() -> None:
    """A missing key is a KeyError, an unknown value or a contradiction a ValueError."""
    good = runtime_plan().as_dict()
    with pytest.raises(KeyError):
        RuntimePlan.from_dict({name: good[name] for name in good if name != "reason"}, resolved_model=resolved())
    for change in ({"support_level": "superb"}, {"specialization_pass_ids": ["turbo"]}, {"specialization_applied": True}):
        with pytest.raises(ValueError):  # noqa: PT011 - each names another problem
            RuntimePlan.from_dict({**good, **change}, resolved_model=resolved())


@pytest.mark.parametrize("path", ["/models/tiny", "../tiny", "a/../../b"])
def test_a_resolved_model_never_leaves_the_models_root(path: str) -> None:
    """An absolute or climbing path cannot stand in a stored plan."""
    with pytest.raises(ValueError, match="inside the models root"):
        resolved(model_path=PurePosixPath(path))


def test_downloadable_means_a_repository_and_a_place_for_it() -> None:
    """The directory need not exist."""
    assert not resolved().is_downloadable
    assert resolved(repo_id="org/name").is_downloadable
    assert not resolved(repo_id="org/name", model_path=None).is_downloadable
    assert "is_downloadable" not in {item.name for item in dataclasses.fields(ResolvedModel)}
