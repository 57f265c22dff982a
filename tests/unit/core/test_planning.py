"""Does every row of the decision table give its plan, and does a reference find the right model?"""

from pathlib import PurePosixPath
from typing import Any

import pytest

from ollm_service.core.catalog import CATALOG, DEFAULT_MODEL, entry_for_repo
from ollm_service.core.errors import InvalidOption, InvalidReference, ModelNotFound
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.passes import PASS_TRAITS
from ollm_service.core.plan import (
    BackendId,
    GenericModelKind,
    ModelModality,
    ModelSourceKind,
    NativeFamily,
    PassId,
    RuntimePlan,
    SpecializationState,
    SupportLevel,
)
from ollm_service.core.planning import plan, plan_resolved
from ollm_service.core.providers import FAMILY_ARCHITECTURES, PROVIDERS, SpecializationProvider, family_of, matching_providers
from tests.unit.core.samples import gpt2, held, planned, profile, resolved

HUB = "unsloth/Llama-3.2-1B-Instruct"


def hub_profile(revision: str, *refs: str, **changes: Any) -> Any:
    """A snapshot of the default model's repository in a hub cache."""
    name = HUB.replace("/", "--")
    return profile(
        name=name if "main" in refs else f"{name}--{revision}",
        path=PurePosixPath(f"models--{name}/snapshots/{revision}"),
        repo_id=HUB,
        revision=revision,
        refs=refs,
        **({"digest": revision * 8} | changes),
    )


# ---------------------------------------------------------------------------------------- the decision table


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


@pytest.mark.parametrize("backend", [None, "optimized-native"])
def test_a_llama_is_native(backend: str | None) -> None:
    """A Llama gets its provider with the passes that exist, in their order, asked for or not."""
    found = planned(RuntimeConfig(backend=backend))
    assert found.backend_id == BackendId.OPTIMIZED_NATIVE
    assert found.support_level is SupportLevel.OPTIMIZED
    assert found.specialization_state is SpecializationState.PLANNED
    assert found.specialization_provider_id == "llama-native"
    assert found.specialization_enabled
    assert found.specialization_pass_ids == (PassId.DISK_CACHE, PassId.MLP_CHUNKING)
    assert (found.supports_disk_cache, found.supports_cpu_offload, found.supports_gpu_offload) == (True, False, False)
    assert "llama-native" in found.reason
    assert "llama family" in found.reason
    assert found.details.get("backend_override") == backend


def test_native_details_record_what_was_chosen_and_asked() -> None:
    """The details of a native plan are texts, with the options that later decisions go by."""
    assert dict(planned(RuntimeConfig(kv_cache_strategy="paged")).details) == {
        "source_kind": "local-path",
        "provider_id": "llama-native",
        "specialization_provider_id": "llama-native",
        "native_family": "llama",
        "architecture": "LlamaForCausalLM",
        "specialization_pass_ids": "disk-cache,mlp-chunking",
        "pass_count": "2",
        "offload_cpu_requested_layers": "0",
        "offload_cpu_policy": "auto",
        "offload_gpu_layers": "0",
        "strategy_selector_profile": "balanced",
        "strategy_selector_requested_override": "paged",
        "mlp_chunking_mode": "adaptive-headroom",
        "mlp_chunking_max_rows": "16384",
    }


def test_explicit_chunk_rows_are_recorded() -> None:
    """Asking for a number of rows switches the mode."""
    found = planned(RuntimeConfig(dense_projection_chunk_rows=7))
    assert found.details["mlp_chunking_mode"] == "explicit-rows"
    assert found.details["mlp_chunking_max_rows"] == "7"


def test_a_family_without_provider_is_generic() -> None:
    """No specialization: transformers' generic classes, with the kind in the reason and the details."""
    found = planned(model=gpt2())
    assert found.backend_id == BackendId.TRANSFORMERS_GENERIC
    assert found.support_level is SupportLevel.GENERIC
    assert found.generic_model_kind is GenericModelKind.CAUSAL_LM
    assert_not_specialized(found)
    assert "causal-lm" in found.reason
    assert found.details["generic_model_kind"] == "causal-lm"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (RuntimeConfig(backend="transformers-generic"), "asked for"),
        (RuntimeConfig(use_specialization=False), "switched off"),
        (RuntimeConfig(backend="transformers-generic", use_specialization=False), "asked for"),
    ],
)
def test_generic_can_be_asked_for(config: RuntimeConfig, reason: str) -> None:
    """The generic backend for a Llama, by name or by switching specialization off."""
    found = planned(config)
    assert found.backend_id == BackendId.TRANSFORMERS_GENERIC
    assert_not_specialized(found)
    assert reason in found.reason
    assert found.details.get("backend_override") == config.backend


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (gpt2(), RuntimeConfig(backend="optimized-native"), "no specialization matches GPT2LMHeadModel"),
        (profile(), RuntimeConfig(adapter_dir="adapter"), "adapter_dir is not supported"),
        (profile(), RuntimeConfig(backend="optimized-native", adapter_dir="a"), "an adapter rules specialization out"),
        (profile(), RuntimeConfig(offload_cpu_layers=1), "needs the cpu-offload pass"),
        (profile(), RuntimeConfig(offload_gpu_layers=1), "needs the gpu-offload pass"),
        (profile(), RuntimeConfig(multimodal=True), "needs the multimodal-shell pass"),
        (profile(), RuntimeConfig(kv_cache_lifecycle="persistent"), "not offered yet"),
        (gpt2(), RuntimeConfig(kv_cache_strategy="paged"), "needs the disk-cache pass, which transformers-generic"),
        (gpt2(), RuntimeConfig(strategy_selector_profile="bounded-window"), "needs the disk-cache pass"),
        (gpt2(), RuntimeConfig(kv_cache_window_tokens=9), "needs the disk-cache pass"),
        (gpt2(), RuntimeConfig(dense_projection_chunk_rows=9), "needs the mlp-chunking pass"),
        (
            profile(),
            RuntimeConfig(use_specialization=False, kv_cache_strategy="paged"),
            "needs the disk-cache pass, which transformers-generic",
        ),
        (gpt2(kind=GenericModelKind.SEQ2SEQ_LM), RuntimeConfig(), "kind `seq2seq-lm`, which no backend runs yet"),
        (gpt2(kind=GenericModelKind.IMAGE_TEXT_TO_TEXT), RuntimeConfig(), "kind `image-text-to-text`"),
        (gpt2(kind=None), RuntimeConfig(), "not of a kind that transformers-generic loads"),
        (gpt2(kind=None), RuntimeConfig(backend="transformers-generic"), "not of a kind"),
        (gpt2(kind=None), RuntimeConfig(use_specialization=False), "not of a kind"),
        (gpt2(kind=None, architecture=None), RuntimeConfig(backend="optimized-native"), "architecture is not known"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(model: Any, config: RuntimeConfig, reason: str) -> None:
    """A demand that no backend meets gives a plan that is not executable and says why, before anything is stored."""
    found = planned(config, model)
    assert not found.is_executable()
    assert reason in found.reason
    assert "selected" not in found.reason
    assert_not_specialized(found)


def test_without_a_cache_there_is_no_disk_cache() -> None:
    """`use_cache=False` leaves the pass out, and the flag with it."""
    found = planned(RuntimeConfig(use_cache=False))
    assert found.specialization_pass_ids == (PassId.MLP_CHUNKING,)
    assert not found.supports_disk_cache


def test_several_matching_providers_are_ambiguous() -> None:
    """Two specializations for one model are refused by name."""
    twin = SpecializationProvider(
        provider_id="llama-twin", family=NativeFamily.LLAMA, architectures=frozenset({"LlamaForCausalLM"}), pass_ids=()
    )
    with pytest.raises(InvalidOption, match="llama-native, llama-twin"):
        plan_resolved(resolved(), RuntimeConfig(), (*PROVIDERS, twin))


def test_a_model_that_nobody_has_or_may_fetch_is_refused_with_its_message() -> None:
    """A resolved model without files and without a repository has no backend."""
    found = plan_resolved(
        resolved(digest=None, generic_model_kind=None, architecture=None, resolution_message="Nobody has it."), RuntimeConfig()
    )
    assert (found.backend_id, found.reason) == (None, "Nobody has it.")


def test_a_provider_matches_architecture_and_family() -> None:
    """Neither alone is enough."""
    assert matching_providers(resolved()) == PROVIDERS
    assert matching_providers(resolved(native_family=NativeFamily.GEMMA3)) == ()
    assert matching_providers(resolved(architecture="GPT2LMHeadModel")) == ()


def test_families_own_their_architectures() -> None:
    """Every architecture belongs to one family; others to none."""
    owned = [architecture for architectures in FAMILY_ARCHITECTURES.values() for architecture in architectures]
    assert len(set(owned)) == len(owned)
    for family, architectures in FAMILY_ARCHITECTURES.items():
        assert {family_of(architecture) for architecture in architectures} == {family}
    assert family_of("GPT2LMHeadModel") is None
    assert family_of(None) is None


def test_every_pass_has_traits() -> None:
    """Only the three passes that carry a support flag set one."""
    assert set(PASS_TRAITS) == set(PassId)
    assert {pass_id: traits.sets for pass_id, traits in PASS_TRAITS.items() if traits.sets} == {
        PassId.DISK_CACHE: "supports_disk_cache",
        PassId.CPU_OFFLOAD: "supports_cpu_offload",
        PassId.GPU_OFFLOAD: "supports_gpu_offload",
    }


# ---------------------------------------------------------------------------------------- resolution


def test_a_folder_is_found_by_its_name_and_by_its_path() -> None:
    """An opaque name and a local path lead to the same folder; the source kind tells them apart."""
    by_name = plan("tiny-llama", [held()], RuntimeConfig()).plan.resolved_model
    by_path = plan("./tiny-llama/", [held()], RuntimeConfig()).plan.resolved_model
    assert (by_name.source_kind, by_path.source_kind) == (ModelSourceKind.OPAQUE, ModelSourceKind.LOCAL_PATH)
    assert by_name.model_path == by_path.model_path == PurePosixPath("tiny-llama")
    assert by_name.digest == by_path.digest == "d" * 64
    assert by_path.normalized_name == "tiny-llama"


def test_a_path_reaches_into_the_hub_cache() -> None:
    """A snapshot may be named by its path under the models root."""
    snapshot = hub_profile("abc", "main")
    assert plan(f"path:{snapshot.path}", [held(snapshot)], RuntimeConfig()).profile == snapshot


@pytest.mark.parametrize("reference", ["unknown", "path:unknown", "./unknown", "s3://bucket/x", "tiny-LLAMA"])
def test_a_name_that_nobody_has_is_not_found(reference: str) -> None:
    """The refusal lists what is on the fleet and the aliases."""
    with pytest.raises(ModelNotFound, match="No worker has a model named") as refusal:
        plan(reference, [held(profile(), "w1", "w2")], RuntimeConfig())
    assert (refusal.value.status, refusal.value.code) == (404, "model_not_found")
    assert "tiny-llama (2 workers)" in (refusal.value.remedy or "")
    assert DEFAULT_MODEL in (refusal.value.remedy or "")


def test_a_refused_folder_is_never_planned() -> None:
    """An unsafe folder does not answer to its name."""
    with pytest.raises(ModelNotFound):
        plan("tiny-llama", [held(profile(unsafe_because="pickle"))], RuntimeConfig())


def test_a_hostile_reference_is_refused_before_the_inventory_is_asked() -> None:
    """Planning passes the grammar's refusal on."""
    with pytest.raises(InvalidReference):
        plan("path:/etc", [held()], RuntimeConfig())


def test_an_alias_that_nobody_has_plans_by_its_family() -> None:
    """The catalog's Llama is native before any worker has it, pinned to no digest, and may be fetched."""
    planned_alias = plan(DEFAULT_MODEL, [], RuntimeConfig())
    model = planned_alias.plan.resolved_model
    assert planned_alias.profile is None
    assert planned_alias.plan.backend_id == BackendId.OPTIMIZED_NATIVE
    assert (model.source_kind, model.catalog_entry, model.repo_id) == (ModelSourceKind.BUILTIN, DEFAULT_MODEL, HUB)
    assert model.is_downloadable
    assert model.digest is None
    assert "No worker has" in model.resolution_message


@pytest.mark.parametrize("alias", [entry.alias for entry in CATALOG.values() if entry.family is not NativeFamily.LLAMA])
def test_aliases_of_other_families_wait_as_generic(alias: str) -> None:
    """An alias whose family has no provider yet is loaded generically once a worker has it."""
    found = plan(alias, [], RuntimeConfig()).plan
    assert found.backend_id == BackendId.TRANSFORMERS_GENERIC
    assert "once a worker has fetched it" in found.reason
    assert found.resolved_model.capabilities.support_level is SupportLevel.OPTIMIZED


def test_the_catalog_is_what_it_was() -> None:
    """Aliases are public names: each keeps its repository, family and modalities."""
    assert {entry.alias: (entry.repo_id, entry.family.value, entry.supports_disk_cache) for entry in CATALOG.values()} == {
        "llama3-1B-chat": ("unsloth/Llama-3.2-1B-Instruct", "llama", True),
        "llama3-3B-chat": ("unsloth/Llama-3.2-3B-Instruct", "llama", True),
        "llama3-8B-chat": ("unsloth/Meta-Llama-3.1-8B-Instruct", "llama", True),
        "gpt-oss-20B": ("AnuarSh/gpt-oss-20B", "gpt-oss", False),
        "qwen3-next-80B": ("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3-next", True),
        "gemma3-12B": ("google/gemma-3-12b-it", "gemma3", True),
        "voxtral-small-24B": ("mistralai/Voxtral-Small-24B-2507", "voxtral", True),
    }
    with_processor = {entry.alias: entry.modalities[1] for entry in CATALOG.values() if entry.requires_processor}
    assert with_processor == {"gemma3-12B": ModelModality.IMAGE, "voxtral-small-24B": ModelModality.AUDIO}
    assert entry_for_repo("org/unknown") is None


def test_an_alias_keeps_its_capabilities_but_its_files_decide_the_backend() -> None:
    """A GPT-2 in the folder of an alias is generic, whatever the alias promises."""
    found = plan(DEFAULT_MODEL, [held(gpt2(name=DEFAULT_MODEL))], RuntimeConfig()).plan
    assert found.backend_id == BackendId.TRANSFORMERS_GENERIC
    assert found.resolved_model.capabilities.support_level is SupportLevel.OPTIMIZED


@pytest.mark.parametrize("reference", [DEFAULT_MODEL, HUB, f"hf:{HUB}", f"{DEFAULT_MODEL}@main"])
@pytest.mark.parametrize(
    "model", [profile(name=DEFAULT_MODEL), profile(name=HUB.replace("/", "--")), hub_profile("abc", "main")], ids=lambda m: m.name
)
def test_an_alias_and_its_repository_share_their_folder(reference: str, model: Any) -> None:
    """Alias, repository id and either's folder name all mean the same model."""
    found = plan(reference, [held(model)], RuntimeConfig())
    assert found.profile == model
    assert found.plan.resolved_model.catalog_entry == DEFAULT_MODEL
    assert found.plan.resolved_model.normalized_name == DEFAULT_MODEL


def test_a_revision_sets_a_repository_apart_from_its_alias() -> None:
    """`org/name@revision` means the folder of that revision, not the alias's."""
    found = plan(f"{HUB}@main", [held(profile(name=DEFAULT_MODEL))], RuntimeConfig())
    assert found.profile is None
    assert found.plan.resolved_model.catalog_entry is None
    assert found.plan.model_path == PurePosixPath(f"{HUB.replace('/', '--')}--main")
    named = profile(name=f"{HUB.replace('/', '--')}--main")
    assert plan(f"{HUB}@main", [held(named)], RuntimeConfig()).profile == named


@pytest.mark.parametrize("reference", [HUB, DEFAULT_MODEL])
def test_a_snapshot_is_held_to_the_revision_asked_for(reference: str) -> None:
    """By commit or by branch the right snapshot is found, none stands in for another, and `main` is the default."""
    inventory = [held(hub_profile("old", "v1"), "w1", "w2"), held(hub_profile("new", "main"), "w3")]
    assert plan(f"{reference}@old", inventory, RuntimeConfig()).plan.resolved_model.digest == "old" * 8
    assert plan(f"{reference}@v1", inventory, RuntimeConfig()).plan.resolved_model.digest == "old" * 8
    assert plan(f"{reference}@new", inventory, RuntimeConfig()).plan.resolved_model.digest == "new" * 8
    assert plan(f"{reference}@v2", inventory, RuntimeConfig()).profile is None
    assert plan(reference, inventory, RuntimeConfig()).plan.resolved_model.digest == "new" * 8


def test_of_two_digests_under_one_name_the_commonest_is_pinned() -> None:
    """The model that most workers hold wins, then the smaller digest, whatever the order of the inventory."""
    rare, common = profile(digest="a" * 64), profile(digest="b" * 64)
    for inventory in ([held(rare, "w1"), held(common, "w2", "w3")], [held(common, "w2", "w3"), held(rare, "w1")]):
        assert plan("tiny-llama", inventory, RuntimeConfig()).profile == common
    for inventory in ([held(rare, "w1"), held(common, "w2")], [held(common, "w2"), held(rare, "w1")]):
        assert plan("tiny-llama", inventory, RuntimeConfig()).profile == rare


def test_the_same_digest_in_different_places_counts_together() -> None:
    """Workers that keep one model at several paths are counted once each, for that model."""
    rare = profile(digest="a" * 64)
    common = [profile(digest="b" * 64, path=PurePosixPath(path)) for path in ("one", "two", "three")]
    inventory = [held(rare, "w1", "w2"), *(held(model, worker) for model, worker in zip(common, ("w3", "w4", "w5"), strict=True))]
    assert plan("tiny-llama", inventory, RuntimeConfig()).plan.resolved_model.digest == "b" * 64
    twice = [held(rare, "w1", "w2"), *(held(model, "w3") for model in common)]
    assert plan("tiny-llama", twice, RuntimeConfig()).plan.resolved_model.digest == "a" * 64


def test_an_unknown_hub_id_waits_for_a_worker_that_may_fetch_it() -> None:
    """Nothing is known of it but its name; the plan is generic and carries repository and revision."""
    found = plan("org/name@v2", [], RuntimeConfig()).plan
    model = found.resolved_model
    assert found.backend_id == BackendId.TRANSFORMERS_GENERIC
    assert found.generic_model_kind is None
    assert (model.source_kind, model.repo_id, model.revision) == (ModelSourceKind.HUGGING_FACE, "org/name", "v2")
    assert model.model_path == PurePosixPath("org--name--v2")
    assert model.capabilities.support_level is SupportLevel.UNSUPPORTED
    assert not model.capabilities.supports_disk_cache


def test_a_model_that_is_held_is_not_downloaded_to_become_runnable() -> None:
    """A hub model whose files are there and are of no runnable kind is refused, though it could be fetched again."""
    model = hub_profile("abc", "main", kind=None, family=None, architecture="BertForMaskedLM")
    found = plan(f"{HUB}@main", [held(model)], RuntimeConfig()).plan
    assert not found.is_executable()


def test_inspected_models_tell_their_own_capabilities() -> None:
    """Level, modalities and specialization of a model outside the catalog follow from its files."""
    llama = planned().resolved_model.capabilities
    other = planned(model=gpt2(modalities=(ModelModality.TEXT, ModelModality.IMAGE))).resolved_model.capabilities
    assert (llama.support_level, llama.supports_disk_cache, llama.supports_specialization) == (SupportLevel.GENERIC, True, True)
    assert (other.supports_disk_cache, other.supports_specialization) == (False, False)
    assert other.modalities == (ModelModality.TEXT, ModelModality.IMAGE)
    assert llama.supports_local_materialization
