"""Does every row of the decision table give its plan, does every family plan its passes, and is every refusal honest?

Numbers in brackets are those of the rules in docs/planning.md: 1 to 8, 10, 27 to 29, 36, 37, 40 and 41 are held here.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import pytest

from ollm_service.core.catalog import CATALOG, DEFAULT_MODEL
from ollm_service.core.decisions import BACKEND_CHOICES, DECISIONS, NOT_SET, UNKNOWN, Outcome, decide
from ollm_service.core.errors import InvalidOption, InvalidReference
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.passes import PASS_TRAITS
from ollm_service.core.plan import (
    BackendId,
    GenericModelKind,
    ModelModality,
    NativeFamily,
    PassId,
    RuntimePlan,
    SpecializationState,
    SupportLevel,
)
from ollm_service.core.planning import plan, plan_resolved
from ollm_service.core.profile import ModelProfile
from ollm_service.core.providers import (
    FAMILY_ARCHITECTURES,
    PASS_RULES,
    PROVIDERS,
    SpecializationProvider,
    family_of,
    matching_providers,
)
from tests.unit.core.samples import gpt2, held, planned, profile, resolved

P = PassId
TEXT, IMAGE, AUDIO = ModelModality.TEXT, ModelModality.IMAGE, ModelModality.AUDIO
OFFLOAD = RuntimeConfig(offload_cpu_layers=1)


def of_family(family: NativeFamily, **changes: Any) -> ModelProfile:
    """A model of the family's first architecture."""
    return profile(name=family.value, architecture=FAMILY_ARCHITECTURES[family][0], family=family, **changes)


GEMMA3 = of_family(
    NativeFamily.GEMMA3,
    kind=GenericModelKind.IMAGE_TEXT_TO_TEXT,
    modalities=(TEXT, IMAGE),
    requires_processor=True,
    has_processor=True,
)
VOXTRAL = of_family(NativeFamily.VOXTRAL, kind=None, modalities=(TEXT, AUDIO), requires_processor=True, has_processor=True)
GPT_OSS = of_family(NativeFamily.GPT_OSS, has_gds_export=True)
QWEN3_NEXT = of_family(NativeFamily.QWEN3_NEXT)
SEQ2SEQ = gpt2(kind=GenericModelKind.SEQ2SEQ_LM, architecture="T5ForConditionalGeneration")
LLAVA = gpt2(
    kind=GenericModelKind.IMAGE_TEXT_TO_TEXT,
    architecture="LlavaForConditionalGeneration",
    modalities=(TEXT, IMAGE),
    requires_processor=True,
    has_processor=True,
)


def assert_not_specialized(found: RuntimePlan) -> None:
    """A plan without specialization has no trace of one."""
    assert found.specialization_state is SpecializationState.NOT_PLANNED
    assert not (found.specialization_enabled)
    assert not (found.specialization_applied)
    assert not (found.specialization_pass_ids)
    assert not (found.supports_disk_cache)
    assert not (found.supports_cpu_offload)
    assert not (found.supports_gpu_offload)
    assert found.specialization_provider_id is None


# ---------------------------------------------------------------------------------------- the decision table


@pytest.mark.parametrize(
    ("backend", "use_specialization", "is_specialized", "is_loadable"),
    list(itertools.product(BACKEND_CHOICES, (True, False), (True, False), (True, False))),
)
def test_exactly_one_row_fits(backend: str, use_specialization: bool, is_specialized: bool, is_loadable: bool) -> None:
    """Whatever is asked for and known, the table has one answer; what options cannot be made is refused as such."""
    facts = {"use_specialization": use_specialization, "is_specialized": is_specialized, "is_loadable": is_loadable}
    (row,) = [row for row in DECISIONS if row.fits(backend, **facts)]
    options: dict[str, Any] = {"backend": None if backend == NOT_SET else backend, "use_specialization": use_specialization}
    if row.outcome is Outcome.INVALID:
        with pytest.raises(InvalidOption, match=re.escape(row.reason.format(backend=UNKNOWN))):
            RuntimeConfig(**options)
        return
    assert decide(RuntimeConfig(**options), is_specialized=is_specialized, is_loadable=is_loadable) is row


@pytest.mark.parametrize(
    ("config", "model", "outcome"),
    [
        (RuntimeConfig(backend="optimized-native"), profile(), Outcome.NATIVE),
        (RuntimeConfig(backend="optimized-native"), gpt2(), Outcome.NOT_EXECUTABLE),
        (RuntimeConfig(backend="transformers-generic"), profile(), Outcome.GENERIC),
        (RuntimeConfig(backend="transformers-generic", use_specialization=False), profile(), Outcome.GENERIC),
        (RuntimeConfig(backend="transformers-generic"), VOXTRAL, Outcome.NOT_EXECUTABLE),
        (RuntimeConfig(), profile(), Outcome.NATIVE),
        (RuntimeConfig(), VOXTRAL, Outcome.NATIVE),
        (RuntimeConfig(), gpt2(), Outcome.GENERIC),
        (RuntimeConfig(), SEQ2SEQ, Outcome.GENERIC),
        (RuntimeConfig(), LLAVA, Outcome.GENERIC),
        (RuntimeConfig(), gpt2(kind=None), Outcome.NOT_EXECUTABLE),
        (RuntimeConfig(use_specialization=False), profile(), Outcome.GENERIC),
        (RuntimeConfig(use_specialization=False), VOXTRAL, Outcome.NOT_EXECUTABLE),
        (RuntimeConfig(adapter_dir="lora"), profile(), Outcome.GENERIC),
        (RuntimeConfig(adapter_dir="lora"), VOXTRAL, Outcome.NOT_EXECUTABLE),
        (RuntimeConfig(adapter_dir="lora", backend="optimized-native"), profile(), Outcome.NOT_EXECUTABLE),
    ],
)
def test_each_row_gives_its_plan(config: RuntimeConfig, model: ModelProfile, outcome: Outcome) -> None:
    """Backend, support level, state and details are those of the row that fits (6, 7, 8)."""
    found = planned(config, model)
    backends = {Outcome.NATIVE: BackendId.OPTIMIZED_NATIVE, Outcome.GENERIC: BackendId.TRANSFORMERS_GENERIC}
    assert found.backend_id == backends.get(outcome)
    assert found.reason
    assert "{" not in found.reason
    if outcome is Outcome.NATIVE:
        assert (found.support_level, found.specialization_state) == (SupportLevel.OPTIMIZED, SpecializationState.PLANNED)
        assert found.specialization_enabled
        assert not found.specialization_applied
        assert str(found.specialization_provider_id) in found.reason
        return
    assert_not_specialized(found)
    if outcome is Outcome.GENERIC:
        assert found.support_level is SupportLevel.GENERIC
        assert found.details.get("backend_override") == config.backend
        assert found.details["generic_model_kind"] == found.generic_model_kind
    else:
        assert found.support_level is found.resolved_model.capabilities.support_level
        assert "selected" not in found.reason


def test_details_of_a_native_plan_record_what_was_chosen_and_asked() -> None:
    """They are texts, with the options that later decisions go by; no host's facts are among them (4)."""
    config = RuntimeConfig(
        kv_cache_strategy="paged", backend="optimized-native", offload_cpu_layers=3, offload_cpu_policy="suffix"
    )
    assert dict(planned(config).details) == {
        "source_kind": "local-path",
        "provider_id": "llama-native",
        "specialization_provider_id": "llama-native",
        "native_family": "llama",
        "architecture": "LlamaForCausalLM",
        "specialization_pass_ids": "disk-cache,cpu-offload,mlp-chunking",
        "pass_count": "3",
        "offload_cpu_requested_layers": "3",
        "offload_cpu_policy": "suffix",
        "offload_gpu_layers": "0",
        "strategy_selector_profile": "balanced",
        "strategy_selector_requested_override": "paged",
        "mlp_chunking_mode": "adaptive-headroom",
        "mlp_chunking_max_rows": "16384",
        "backend_override": "optimized-native",
    }


@pytest.mark.parametrize(
    ("device", "where"), [("cpu", "host"), ("mps", "accelerator-resident"), ("cuda:1", "accelerator-resident")]
)
def test_a_pinned_device_is_told(device: str, where: str) -> None:
    """Host or accelerator, by the kind of device alone; nothing is said of a device that was not asked for (3)."""
    found = planned(RuntimeConfig(device=device)).details
    assert (found["execution_device_type"], found["specialization_device_profile"]) == (device.partition(":")[0], where)
    assert "execution_device_type" not in planned().details


def test_explicit_chunk_rows_are_recorded() -> None:
    """Asking for a number of rows switches the mode (5)."""
    found = planned(RuntimeConfig(dense_projection_chunk_rows=7))
    assert found.details["mlp_chunking_mode"] == "explicit-rows"
    assert found.details["mlp_chunking_max_rows"] == "7"


# ---------------------------------------------------------------------------------------- providers and passes

BASE: Mapping[NativeFamily, tuple[PassId, ...]] = {
    NativeFamily.LLAMA: (P.DISK_CACHE, P.CPU_OFFLOAD, P.MLP_CHUNKING),
    NativeFamily.GEMMA3: (P.DISK_CACHE, P.CPU_OFFLOAD, P.MLP_CHUNKING),
    NativeFamily.VOXTRAL: (P.DISK_CACHE, P.CPU_OFFLOAD, P.MLP_CHUNKING),
    NativeFamily.QWEN3_NEXT: (P.DISK_CACHE, P.CPU_OFFLOAD, P.GPU_OFFLOAD, P.MOE_ROUTING),
    NativeFamily.GPT_OSS: (P.CPU_OFFLOAD, P.MOE_ROUTING, P.ATTENTION_REPLACEMENT, P.GDS_EXPORT_WEIGHTS),
}


@pytest.mark.parametrize(
    ("family", "architecture"), [(family, name) for family, names in FAMILY_ARCHITECTURES.items() for name in names]
)
def test_each_family_plans_its_passes(family: NativeFamily, architecture: str) -> None:
    """Every architecture of a family has the family's provider, passes in their order and the flags that those set (1, 2, 29)."""
    model = of_family(family, has_gds_export=True)
    found = planned(
        model=profile(
            **{name: getattr(model, name) for name in ("name", "family")}, architecture=architecture, has_gds_export=True
        )
    )
    assert found.specialization_provider_id == f"{family}-native"
    assert found.specialization_pass_ids == BASE[family]
    assert found.supports_disk_cache is (family is not NativeFamily.GPT_OSS)
    assert found.supports_cpu_offload
    assert found.supports_gpu_offload is (family is NativeFamily.QWEN3_NEXT)


@pytest.mark.parametrize("model", [GEMMA3, VOXTRAL])
def test_images_and_sounds_add_the_shell(model: ModelProfile) -> None:
    """With `multimodal` the shell is planned, and demanded; without, the model runs on text alone (27)."""
    assert P.MULTIMODAL_SHELL not in planned(model=model).specialization_pass_ids
    assert planned(RuntimeConfig(multimodal=True), model).specialization_pass_ids[-1] is P.MULTIMODAL_SHELL


def test_a_text_model_of_a_seeing_family_has_no_shell() -> None:
    """A Gemma 3 without eyes refuses images, and says why."""
    model = profile(name="text", architecture="Gemma3ForCausalLM", family=NativeFamily.GEMMA3)
    assert planned(model=model).specialization_pass_ids == BASE[NativeFamily.GEMMA3]
    refused = planned(RuntimeConfig(multimodal=True), model)
    assert not refused.is_executable()
    assert refused.reason == "multimodal was asked for, but Gemma3ForCausalLM takes text alone."


def test_without_a_cache_there_is_no_disk_cache() -> None:
    """`use_cache=False` leaves the pass out, and the flag with it."""
    found = planned(RuntimeConfig(use_cache=False))
    assert found.specialization_pass_ids == (P.CPU_OFFLOAD, P.MLP_CHUNKING)
    assert not found.supports_disk_cache


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (of_family(NativeFamily.GPT_OSS), "gpt-oss-native needs a gds_export folder, which it has not"),
        (of_family(NativeFamily.GPT_OSS, gds_export_problem="its manifest names no tensor"), "and its manifest names no tensor"),
    ],
)
def test_gpt_oss_without_its_export_is_generic(model: ModelProfile, reason: str) -> None:
    """The provider reads exported weights: without sound ones it does not match, and the reason says so."""
    found = planned(model=model)
    assert found.backend_id == BackendId.TRANSFORMERS_GENERIC
    assert_not_specialized(found)
    assert reason in found.reason
    assert reason in planned(RuntimeConfig(backend="optimized-native"), model).reason


def test_the_catalog_may_forbid_the_disk_cache() -> None:
    """What the catalog says of a model holds for its files too, as it does for gpt-oss; others may page."""
    model = profile(name="gpt-oss-20B", family=NativeFamily.LLAMA)
    as_alias = plan("gpt-oss-20B", [held(model)], RuntimeConfig()).plan
    assert as_alias.specialization_pass_ids == (P.CPU_OFFLOAD, P.MLP_CHUNKING)
    assert P.DISK_CACHE in planned(model=model).specialization_pass_ids


@pytest.mark.parametrize("entry", CATALOG.values(), ids=lambda entry: entry.alias)
def test_an_alias_that_nobody_has_plans_by_its_family(entry: Any) -> None:
    """Each alias is native before any worker has it; what it will be loaded as is known only then."""
    found = plan(entry.alias, [], RuntimeConfig()).plan
    assert (found.backend_id, found.specialization_provider_id) == (BackendId.OPTIMIZED_NATIVE, f"{entry.family}-native")
    assert found.specialization_pass_ids == BASE[entry.family]
    assert found.supports_disk_cache is entry.supports_disk_cache
    assert found.generic_model_kind is None
    generic = plan(entry.alias, [], RuntimeConfig(use_specialization=False)).plan
    assert "once a worker has fetched it" in generic.reason


def test_several_matching_providers_are_ambiguous() -> None:
    """Two specializations for one model are refused by name."""
    twin = SpecializationProvider(provider_id="llama-twin", family=NativeFamily.LLAMA)
    with pytest.raises(InvalidOption, match="llama-native, llama-twin"):
        plan_resolved(resolved(), RuntimeConfig(), (*PROVIDERS, twin))


def test_a_provider_matches_architecture_and_family() -> None:
    """Neither alone is enough; no provider, no passes (10, 28)."""
    assert [provider.provider_id for provider in matching_providers(resolved())] == ["llama-native"]
    assert matching_providers(resolved(native_family=NativeFamily.GEMMA3)) == ()
    assert matching_providers(resolved(architecture="GPT2LMHeadModel")) == ()
    assert_not_specialized(plan_resolved(resolved(native_family=None), RuntimeConfig()))


def test_families_own_their_architectures() -> None:
    """Every architecture belongs to one family; others to none."""
    owned = [architecture for architectures in FAMILY_ARCHITECTURES.values() for architecture in architectures]
    assert len(set(owned)) == len(owned)
    for family, architectures in FAMILY_ARCHITECTURES.items():
        assert {family_of(architecture) for architecture in architectures} == {family}
    assert family_of("GPT2LMHeadModel") is None
    assert family_of(None) is None


def test_every_family_has_a_provider_and_every_pass_a_rule() -> None:
    """In the order of the passes; provider ids are unique."""
    assert {provider.family for provider in PROVIDERS} == set(NativeFamily)
    assert len({provider.provider_id for provider in PROVIDERS}) == len(PROVIDERS)
    assert [rule.pass_id for rule in PASS_RULES] == list(PassId)
    assert all(rule.families for rule in PASS_RULES)


def test_every_pass_has_traits() -> None:
    """Only the three passes that carry a support flag set one."""
    assert set(PASS_TRAITS) == set(PassId)
    assert {pass_id: traits.sets for pass_id, traits in PASS_TRAITS.items() if traits.sets} == {
        PassId.DISK_CACHE: "supports_disk_cache",
        PassId.CPU_OFFLOAD: "supports_cpu_offload",
        PassId.GPU_OFFLOAD: "supports_gpu_offload",
    }


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (gpt2(), RuntimeConfig(backend="optimized-native"), "no specialization matches GPT2LMHeadModel"),
        (profile(), RuntimeConfig(backend="optimized-native", adapter_dir="a"), "an adapter rules specialization out"),
        (gpt2(), OFFLOAD, "needs the cpu-offload pass, which transformers-generic"),
        (profile(), RuntimeConfig(use_specialization=False, offload_cpu_layers=1), "needs the cpu-offload pass"),
        (profile(), RuntimeConfig(adapter_dir="lora", offload_cpu_layers=1), "needs the cpu-offload pass"),
        (profile(), RuntimeConfig(offload_gpu_layers=1), "needs the gpu-offload pass, which optimized-native"),
        (profile(), RuntimeConfig(multimodal=True), "LlamaForCausalLM takes text alone"),
        (SEQ2SEQ, RuntimeConfig(multimodal=True), "T5ForConditionalGeneration takes text alone"),
        (of_family(NativeFamily.GEMMA3, requires_processor=True), RuntimeConfig(multimodal=True), "needs a processor"),
        (GEMMA3, RuntimeConfig(multimodal=True, dense_projection_chunk_rows=4, use_specialization=False), "mlp-chunking pass"),
        (profile(), RuntimeConfig(kv_cache_lifecycle="persistent"), "not offered yet"),
        (gpt2(), RuntimeConfig(kv_cache_strategy="paged"), "needs the disk-cache pass, which transformers-generic"),
        (GPT_OSS, RuntimeConfig(kv_cache_strategy="paged"), "needs the disk-cache pass, which optimized-native"),
        (gpt2(), RuntimeConfig(strategy_selector_profile="bounded-window"), "needs the disk-cache pass"),
        (gpt2(), RuntimeConfig(kv_cache_window_tokens=9), "needs the disk-cache pass"),
        (gpt2(), RuntimeConfig(dense_projection_chunk_rows=9), "needs the mlp-chunking pass"),
        (QWEN3_NEXT, RuntimeConfig(dense_projection_chunk_rows=9), "needs the mlp-chunking pass, which optimized-native"),
        (
            profile(),
            RuntimeConfig(use_specialization=False, kv_cache_strategy="paged"),
            "needs the disk-cache pass, which transformers-generic",
        ),
        (
            gpt2(kind=None),
            RuntimeConfig(),
            "not of a kind that transformers-generic loads (causal-lm, image-text-to-text, seq2seq-lm)",
        ),
        (gpt2(kind=None), RuntimeConfig(backend="transformers-generic"), "not of a kind"),
        (gpt2(kind=None), RuntimeConfig(use_specialization=False), "Specialization was switched off, and GPT2LMHeadModel is not"),
        (gpt2(kind=None, architecture=None), RuntimeConfig(backend="optimized-native"), "it names no architecture"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(model: Any, config: RuntimeConfig, reason: str) -> None:
    """A demand that no backend meets gives a plan that is not executable and says why, before anything is stored (37)."""
    found = planned(config, model)
    assert not found.is_executable()
    assert reason in found.reason
    assert "selected" not in found.reason
    assert_not_specialized(found)


@pytest.mark.parametrize("model", [LLAVA, GEMMA3])
def test_a_generic_model_takes_images_by_its_kind(model: ModelProfile) -> None:
    """transformers' own class for images and text needs no pass for them."""
    found = planned(RuntimeConfig(multimodal=True, use_specialization=False), model)
    assert (found.backend_id, found.generic_model_kind) == (
        BackendId.TRANSFORMERS_GENERIC,
        GenericModelKind.IMAGE_TEXT_TO_TEXT,
    )


def test_nothing_is_held_against_a_model_that_nobody_has() -> None:
    """Whether an unknown repository takes images shows when it is there."""
    assert plan("org/name", [], RuntimeConfig(multimodal=True)).plan.is_executable()
    assert plan("gemma3-12B", [], RuntimeConfig(multimodal=True)).plan.specialization_pass_ids[-1] is P.MULTIMODAL_SHELL
    assert not plan(DEFAULT_MODEL, [], RuntimeConfig(multimodal=True)).plan.is_executable()


def test_a_model_that_nobody_has_or_may_fetch_is_refused_with_its_message() -> None:
    """A resolved model without files and without a repository has no backend."""
    nowhere = resolved(
        digest=None, generic_model_kind=None, architecture=None, native_family=None, resolution_message="Nobody has it."
    )
    found = plan_resolved(nowhere, RuntimeConfig())
    assert found.backend_id is None
    assert "Nobody has it" in found.reason


@pytest.mark.parametrize("path", ["/etc", "../up", "~/lora", "C:\\lora", "a/../../b"])
def test_an_adapter_stays_inside_the_models_root(path: str) -> None:
    """Its path is hostile input, as a model's is."""
    with pytest.raises(InvalidReference) as refusal:
        planned(RuntimeConfig(adapter_dir=path))
    assert refusal.value.param == "adapter_dir"
