"""Which workers can honour a plan, and does every refusal say what is missing?"""

from pathlib import PurePosixPath
from typing import Any

import pytest

from ollm_service.core.capabilities import Capabilities
from ollm_service.core.errors import InvalidExpression
from ollm_service.core.matching import Match, NoMatch, able_devices, attributes, devices_for, match, match_fleet
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.plan import BackendId, GenericModelKind, ModelModality, NativeFamily, PassId
from ollm_service.core.planning import plan
from ollm_service.core.requirements import Requirements, class_id, demanded_passes, requirements_of
from tests.unit.core.samples import GIB, capabilities, cpu, cuda, gpt2, planned, profile

BACKEND = BackendId.OPTIMIZED_NATIVE
SHORTFALLS: list[tuple[dict[str, Any], str]] = [
    ({"model_digest": "a" * 64}, "model aaaaaaaaaaaa: not in this worker's models folder"),
    ({"download": "org/name"}, "model org/name: not here, and this worker may not download"),
    ({"passes": (PassId.CPU_OFFLOAD,)}, "pass cpu-offload: needs an accelerator"),
    ({"passes": (PassId.MOE_ROUTING,)}, "pass moe-routing: not known to this worker"),
    ({"kv_cache_strategy": KVCacheStrategy.PAGED}, "KV cache strategy paged: no writable cache folder"),
    ({"kv_cache_strategy": "quantized-cold-tier"}, "KV cache strategy quantized-cold-tier: not known to this worker"),
    ({"device": "cuda"}, "device cuda: this worker has cpu"),
    ({"device": "cuda:1"}, "device cuda:1: this worker has cpu"),
    ({"dtype": "bfloat16"}, "dtype bfloat16: not computed by cpu"),
    ({"kind": "seq2seq-lm"}, "models of kind seq2seq-lm: not in this version"),
    ({"adapter": True}, "adapters: not known to this worker"),
    ({"memory_bytes": 33 * GIB}, "memory: 35,433,480,192 bytes needed, cpu has 34,359,738,368"),
    ({"cache_bytes": 1}, "cache disk: 1 bytes needed, 0 there"),
    ({"where": 'zone == "home"'}, 'labels: `zone == "home"` does not hold here'),
]


# ---------------------------------------------------------------------------------------- requirements


def test_requirements_follow_from_plan_model_and_options() -> None:
    """An undemanding plan needs its backend, its exact model, its dtype and the memory of the weights."""
    found = requirements_of(planned(), profile(), RuntimeConfig())
    assert found == Requirements(
        backend_id="optimized-native",
        model_digest="d" * 64,
        dtype="float32",
        kind="causal-lm",
        memory_bytes=4_000_000,
        offloaded_bytes=4_000_000,
    )


def test_of_a_model_whose_layers_may_go_the_largest_must_fit() -> None:
    """A worker that keeps layers off its device needs room for one of them; any other needs room for the whole model."""
    model = profile(layer_bytes=(GIB, 3 * GIB, 2 * GIB), weight_bytes=40 * GIB)
    native = requirements_of(planned(model=model), model, RuntimeConfig())
    assert (native.memory_bytes, native.offloaded_bytes) == (40 * GIB, 3 * GIB)
    able = capabilities(cpu(), cuda(0), passes=dict.fromkeys(PassId), models=(model,))
    assert match(native, able) == Match()
    reason = "memory: 42,949,672,960 bytes needed, cpu has 34,359,738,368"
    assert match(native, capabilities(models=(model,))) == NoMatch(reasons=(reason,))
    small = capabilities(cpu(2 * GIB), passes=dict.fromkeys(PassId), models=(model,))
    assert match(native, small) == NoMatch(reasons=("memory: 3,221,225,472 bytes needed, cpu has 2,147,483,648",))
    generic = requirements_of(planned(RuntimeConfig(use_specialization=False), model), model, RuntimeConfig())
    assert generic.offloaded_bytes == 40 * GIB


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (gpt2(kind=GenericModelKind.SEQ2SEQ_LM), "seq2seq-lm"),
        (gpt2(kind=GenericModelKind.IMAGE_TEXT_TO_TEXT), "image-text-to-text"),
        (profile(architecture="VoxtralForConditionalGeneration", family=NativeFamily.VOXTRAL, kind=None), "voxtral"),
    ],
)
def test_a_worker_must_run_models_of_that_kind(model: Any, kind: str) -> None:
    """Where only the family can run a model, the family is the kind. Workers that say nothing run causal models alone."""
    needs = requirements_of(planned(model=model), model, RuntimeConfig())
    assert needs.kind == kind
    silent = capabilities(models=(model,))
    assert match(needs, silent) == NoMatch(reasons=(f"models of kind {kind}: not known to this worker",))
    assert match(needs, capabilities(models=(model,), kinds={kind: "no processor"})) == NoMatch(
        reasons=(f"models of kind {kind}: no processor",)
    )
    assert match(needs, capabilities(models=(model,), kinds={kind: None})) == Match()


def test_an_adapter_needs_a_worker_that_puts_it_on() -> None:
    """The plan is generic and may be queued; who cannot load adapters is refused."""
    config = RuntimeConfig(adapter_dir="lora")
    needs = requirements_of(planned(config), profile(), config)
    assert needs.adapter
    assert match(needs, capabilities()) == NoMatch(reasons=("adapters: not known to this worker",))
    assert match(needs, capabilities(no_adapters_because=None)) == Match()


@pytest.mark.parametrize(
    ("config", "passes", "strategy"),
    [
        (RuntimeConfig(), (), None),
        (RuntimeConfig(kv_cache_strategy="resident"), (), "resident"),
        (RuntimeConfig(kv_cache_strategy="paged"), (PassId.DISK_CACHE,), "paged"),
        (RuntimeConfig(kv_cache_window_tokens=9), (PassId.DISK_CACHE,), "sliding-window-ring-buffer"),
        (RuntimeConfig(strategy_selector_profile="bounded-window"), (PassId.DISK_CACHE,), "sliding-window-ring-buffer"),
        (RuntimeConfig(strategy_selector_profile="latency"), (), None),
        (RuntimeConfig(dense_projection_chunk_rows=9), (PassId.MLP_CHUNKING,), None),
        (
            RuntimeConfig(dense_projection_chunk_rows=9, kv_cache_strategy="paged"),
            (PassId.DISK_CACHE, PassId.MLP_CHUNKING),
            "paged",
        ),
    ],
)
def test_only_what_was_asked_for_is_hard(config: RuntimeConfig, passes: tuple[PassId, ...], strategy: str | None) -> None:
    """A demanded pass becomes a requirement, a preferred one does not; a demanded disk cache needs a disk."""
    found = requirements_of(planned(config), profile(), config)
    assert found.passes == demanded_passes(planned(config), config) == passes
    assert found.kv_cache_strategy == strategy
    assert (found.cache_bytes > 0) is (PassId.DISK_CACHE in passes)


def test_a_model_that_nobody_has_is_to_be_fetched() -> None:
    """Without a profile the plan needs a worker that may fetch the repository, at its revision."""
    for reference, download in (("org/name", "org/name"), ("org/name@v1", "org/name@v1")):
        found = requirements_of(plan(reference, [], RuntimeConfig()).plan, None, RuntimeConfig())
        assert (found.model_digest, found.download, found.memory_bytes) == (None, download, 0)


def test_a_plan_that_cannot_run_has_no_requirements() -> None:
    """Nobody may ask for them."""
    with pytest.raises(ValueError, match="not executable"):
        requirements_of(planned(RuntimeConfig(multimodal=True)), profile(), RuntimeConfig())


def test_wrong_requirements_cannot_be_built() -> None:
    """A model is there or is fetched; a label expression can be parsed."""
    with pytest.raises(ValueError, match="not both"):
        Requirements(backend_id=BACKEND, model_digest="d", download="org/name")
    for where in ("", "zone ==", "x" * 2000):
        with pytest.raises(InvalidExpression):
            Requirements(backend_id=BACKEND, where=where)


def test_equal_requirements_share_a_class_and_others_do_not() -> None:
    """The class id is 16 hex digits that depend on every field."""
    base = Requirements(backend_id=BACKEND)
    others = [
        Requirements(backend_id=BackendId.TRANSFORMERS_GENERIC),
        *(Requirements(backend_id=BACKEND, **change) for change, _ in SHORTFALLS),
        Requirements(backend_id=BACKEND, offloaded_bytes=1),
        Requirements(backend_id=BACKEND, modalities=(ModelModality.TEXT, ModelModality.IMAGE)),
    ]
    ids = {class_id(requirements) for requirements in (base, *others)}
    assert len(ids) == 1 + len(others)
    assert all(len(found) == 16 and int(found, 16) >= 0 for found in ids)
    assert class_id(base) == class_id(Requirements(backend_id="optimized-native"))


# ---------------------------------------------------------------------------------------- matching


def bare_worker() -> Capabilities:
    """A worker with a processor, the native backend and nothing else."""
    return capabilities(
        cpu(dtypes=("float32",)),
        backends={BACKEND: None, BackendId.TRANSFORMERS_GENERIC: "transformers is not installed"},
        passes={PassId.CPU_OFFLOAD: "needs an accelerator"},
        kv_strategies={KVCacheStrategy.PAGED: "no writable cache folder"},
        kinds={"causal-lm": None, "seq2seq-lm": "not in this version"},
        models=(profile(digest="a" * 64, unsafe_because="pickle"),),
        cache_disk=None,
    )


@pytest.mark.parametrize(("requirement", "reason"), SHORTFALLS)
def test_each_shortfall_has_its_reason(requirement: dict[str, Any], reason: str) -> None:
    """One requirement that is not met is one reason, which names it and what is there instead."""
    assert match(Requirements(backend_id=BACKEND, **requirement), bare_worker()) == NoMatch(reasons=(reason,))


def test_every_shortfall_is_named_at_once() -> None:
    """A refusal does not stop at the first reason."""
    requirement = {name: value for change, _ in SHORTFALLS for name, value in change.items() if name != "download"}
    found = match(Requirements(**{**requirement, "backend_id": BackendId.TRANSFORMERS_GENERIC, "device": None}), bare_worker())
    assert isinstance(found, NoMatch)
    assert len(found.reasons) == 9
    assert found.reasons[0] == "backend transformers-generic: transformers is not installed"


def test_what_is_offered_matches() -> None:
    """A plan and the worker that has all it asks for go together."""
    config = RuntimeConfig(kv_cache_strategy="paged", dense_projection_chunk_rows=4, device="cuda")
    requirements = requirements_of(planned(config), profile(), config, where='zone == "home" and gpu_memory_gb >= 8')
    assert match(requirements, capabilities(cpu(), cuda(), labels={"zone": "home"})) == Match()


def test_a_requirement_that_is_not_made_refuses_nobody() -> None:
    """A backend alone suits whoever has it; resident KV suits everybody."""
    assert match(Requirements(backend_id=BACKEND), bare_worker()) == Match()
    assert match(Requirements(backend_id=BACKEND, kv_cache_strategy="resident"), bare_worker()) == Match()
    fetcher = capabilities(models=(), may_download=True)
    assert match(Requirements(backend_id=BACKEND, download="org/name"), fetcher) == Match()


def test_a_worker_fetches_what_its_operator_lists() -> None:
    """A pattern is for the repository, whatever the revision; without patterns it may fetch anything."""
    listed = capabilities(models=(), may_download=True, downloadable=("unsloth/*", "org/name"))
    assert match(Requirements(backend_id=BACKEND, download="org/name@v1"), listed) == Match()
    assert match(Requirements(backend_id=BACKEND, download="unsloth/any"), listed) == Match()
    assert match(Requirements(backend_id=BACKEND, download="org/names"), listed) == NoMatch(
        reasons=("model org/names: not here, and this worker may not download anything but unsloth/*, org/name",)
    )
    assert not capabilities(downloadable=("org/*",)).may_fetch("org/name")


def test_a_fleet_match_keeps_eligible_and_refused_apart() -> None:
    """Each worker stands in one of the two, the refused ones with their reasons."""
    found = match_fleet(
        requirements_of(planned(model=gpt2()), gpt2(), RuntimeConfig()),
        {"w1": capabilities(), "w2": capabilities(models=(gpt2(),))},
    )
    assert found.eligible == ("w2",)
    assert list(found.refused) == ["w1"]
    assert "not in this worker's models folder" in found.refused["w1"].reasons[0]


def test_devices_are_chosen_by_name_kind_and_dtype() -> None:
    """Accelerators come first, the larger before the smaller; a pin and a dtype narrow them."""
    small, large, processor = cuda(0), cuda(1, 24 * GIB, dtypes=("bfloat16",)), cpu(dtypes=("float32",))
    worker = capabilities(processor, small, large)
    base = Requirements(backend_id=BACKEND)
    assert devices_for(base, worker) == (large, small, processor)
    assert devices_for(Requirements(backend_id=BACKEND, device="cuda"), worker) == (large, small)
    assert devices_for(Requirements(backend_id=BACKEND, device="cuda:0"), worker) == (small,)
    assert able_devices(Requirements(backend_id=BACKEND, dtype="float32"), worker) == (small, processor)
    assert able_devices(Requirements(backend_id=BACKEND, dtype="bfloat16"), worker) == (large, small)


def test_memory_must_be_on_a_device_that_computes_the_dtype() -> None:
    """A large processor does not help a plan in a dtype that only the small card computes."""
    worker = capabilities(cpu(64 * GIB, dtypes=("float32",)), cuda(0, 8 * GIB, dtypes=("bfloat16",)))
    found = match(Requirements(backend_id=BACKEND, dtype="bfloat16", memory_bytes=16 * GIB), worker)
    assert found == NoMatch(reasons=("memory: 17,179,869,184 bytes needed, cuda:0 has 8,589,934,592",))


def test_label_expressions_see_labels_and_facts() -> None:
    """The operator's labels and the worker's facts can be named; a fact cannot be overridden by a label."""
    worker = capabilities(cpu(), cuda(0), cuda(1), labels={"zone": "home", "rack": 2.0, "device": "lies"})
    assert attributes(worker) == {
        "zone": "home",
        "rack": 2.0,
        "node": "node-a",
        "device": "cuda",
        "gpu_memory_gb": 16.0,
        "host_memory_gb": 32.0,
    }


# ---------------------------------------------------------------------------------------- capabilities


def test_a_worker_has_a_slot_and_a_device() -> None:
    """Anything else is no worker."""
    with pytest.raises(ValueError, match="slot"):
        capabilities(slots=0)
    with pytest.raises(ValueError, match="device"):
        capabilities(devices=())


def test_the_main_device_is_the_largest_accelerator() -> None:
    """However large the processor's memory is."""
    assert capabilities(cpu(), cuda(0, 4 * GIB), cuda(1, 8 * GIB)).main_device.device_id == "cuda:1"
    assert capabilities(cpu()).main_device.device_id == "cpu"


def test_only_usable_models_are_had() -> None:
    """A refused folder is advertised with its reason, and is not there for any plan."""
    assert bare_worker().model("a" * 64) is None
    assert capabilities().model("d" * 64) == profile()
    assert capabilities().model("e" * 64) is None


@pytest.mark.parametrize("path", ["/abs", "../up"])
def test_a_profile_stays_inside_the_models_root(path: str) -> None:
    """A path that leaves the root cannot be advertised."""
    with pytest.raises(ValueError, match="inside the models root"):
        profile(path=PurePosixPath(path))
