"""Does a reference find the right model, on any fleet, and is what it means told rightly?

Numbers in brackets are those of the rules in docs/planning.md: 9, 10, 12, 13 and 30.
"""

from pathlib import PurePosixPath
from typing import Any

import pytest

from ollm_service.core.catalog import CATALOG, DEFAULT_MODEL, entry_for_repo
from ollm_service.core.errors import InvalidReference, ModelNotFound
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import BackendId, ModelModality, ModelSourceKind, SupportLevel
from ollm_service.core.planning import plan
from tests.unit.core.samples import gpt2, held, planned, profile

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
    assert model.architecture is None
    assert planned_alias.plan.backend_id == BackendId.OPTIMIZED_NATIVE
    assert (model.source_kind, model.catalog_entry, model.repo_id) == (ModelSourceKind.BUILTIN, DEFAULT_MODEL, HUB)
    assert model.is_downloadable
    assert model.digest is None
    assert "No worker has" in model.resolution_message


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


def test_a_choice_between_digests_is_shown_and_can_be_made_otherwise() -> None:
    """The message names the one that was taken and the others with their workers; `@sha256:` takes another."""
    rare, common = profile(digest="a" * 64), profile(digest="b" * 64)
    inventory = [held(rare, "w1"), held(common, "w2", "w3")]
    message = plan("tiny-llama", inventory, RuntimeConfig()).plan.resolved_model.resolution_message
    assert message.startswith("2 workers have it as tiny-llama")
    assert "Of 2 different models of that name this is bbbbbbbbbbbb; the others: aaaaaaaaaaaa (1 worker has it)" in message
    assert "tiny-llama@sha256:DIGEST" in message
    chosen = plan("tiny-llama@sha256:aaaaaa", inventory, RuntimeConfig()).plan.resolved_model
    assert chosen.digest == "a" * 64
    assert "different models" not in chosen.resolution_message
    assert plan(f"tiny-llama@sha256:{'b' * 64}", inventory, RuntimeConfig()).profile == common
    assert "different models" not in planned().resolved_model.resolution_message


@pytest.mark.parametrize("reference", ["tiny-llama@sha256:cccccc", f"{DEFAULT_MODEL}@sha256:cccccc", f"{HUB}@sha256:cccccc"])
def test_a_digest_that_nobody_has_is_not_waited_for(reference: str) -> None:
    """Nothing that could be fetched is known to have it."""
    with pytest.raises(ModelNotFound):
        plan(reference, [held(), held(profile(name=DEFAULT_MODEL))], RuntimeConfig())


def test_a_job_stays_with_the_digest_that_it_has() -> None:
    """The preferred one of several is taken however few workers hold it; one that is gone is not."""
    rare, common = profile(digest="a" * 64), profile(digest="b" * 64)
    inventory = [held(rare, "w1"), held(common, "w2", "w3")]
    assert plan("tiny-llama", inventory, RuntimeConfig(), preferred_digest="a" * 64).profile == rare
    assert plan("tiny-llama", inventory, RuntimeConfig(), preferred_digest="c" * 64).profile == common


def test_a_folder_named_like_an_alias_has_its_own_capabilities() -> None:
    """By its path it is a folder like any other; only the alias itself brings the catalog's word."""
    by_path = plan(f"path:{DEFAULT_MODEL}", [held(gpt2(name=DEFAULT_MODEL))], RuntimeConfig()).plan.resolved_model
    assert by_path.catalog_entry is None
    assert by_path.capabilities.support_level is SupportLevel.GENERIC
    assert by_path.native_family is None


def test_a_model_that_is_held_is_not_downloaded_to_become_runnable() -> None:
    """A hub model whose files are there and are of no runnable kind is refused, though it could be fetched again."""
    model = hub_profile("abc", "main", kind=None, family=None, architecture="BertForMaskedLM")
    found = plan(f"{HUB}@main", [held(model)], RuntimeConfig()).plan
    assert not found.is_executable()


def test_inspected_models_tell_their_own_capabilities() -> None:
    """Level, modalities, processor and specialization of a model outside the catalog follow from its files."""
    llama = planned().resolved_model.capabilities
    other = planned(model=gpt2(modalities=(ModelModality.TEXT, ModelModality.IMAGE))).resolved_model.capabilities
    unknown = planned(model=gpt2(kind=None)).resolved_model.capabilities
    assert (llama.support_level, llama.supports_disk_cache, llama.supports_specialization) == (SupportLevel.GENERIC, False, True)
    assert (other.supports_disk_cache, other.supports_specialization) == (False, False)
    assert other.modalities == (ModelModality.TEXT, ModelModality.IMAGE)
    assert unknown.support_level is SupportLevel.UNSUPPORTED
    assert llama.supports_local_materialization
    assert dict(llama.details) == {}
    seeing = planned(model=gpt2(requires_processor=True, has_gds_export=True)).resolved_model.capabilities
    assert dict(seeing.details) == {"processor_files": "missing", "gds_export": "present"}
