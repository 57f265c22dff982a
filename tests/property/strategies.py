"""Arbitrary but valid values of the core's types, for laws that hold for all of them."""

import string
from dataclasses import fields
from pathlib import PurePosixPath
from typing import Any

from hypothesis import strategies as st

from ollm_service.core.capabilities import CacheDisk, Capabilities, Device, LiveState
from ollm_service.core.errors import InvalidOption
from ollm_service.core.estimates import MemoryEstimate
from ollm_service.core.leasing import AttemptReport, RowError, RowResult, WorkRow
from ollm_service.core.options import (
    CPU_OFFLOAD_POLICIES,
    SELECTOR_PROFILES,
    GenerationConfig,
    KVCacheStrategy,
    RuntimeConfig,
)
from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.placement import Placement, RefusedTier, Tier
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
from ollm_service.core.profile import ModelProfile
from ollm_service.core.quantization import QUANTIZATION_LIBRARIES
from ollm_service.core.requirements import Requirements
from ollm_service.core.wire import (
    AttemptFailed,
    BatchDone,
    BatchStarted,
    DeviceSpeed,
    Execute,
    Finished,
    Hello,
    Loaded,
    Message,
    Progress,
    SpecializationFailed,
    Speed,
    Stop,
    Stopped,
)

GIB = 1024**3
DIGESTS = ["a" * 64, "b" * 64]
DEVICE_IDS = ["cpu", "cuda:0", "cuda:1"]
DTYPES = ["float32", "bfloat16"]
EXPRESSIONS = ['zone == "a"', "rack >= 2", 'not zone == "a"', "gpu_memory_gb > 10", 'zone == "a" or rack < 1']

texts = st.text(max_size=20)
maybe_texts = st.none() | texts
counts = st.integers(0, 2**40)
ratios = st.floats(0, 1e6)
names = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=20).filter(lambda name: set(name) - {"."})
paths = names.map(PurePosixPath)
details = st.dictionaries(names, texts, max_size=3)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | ratios | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
json_objects = st.dictionaries(texts, json_values, max_size=3)
modalities = st.lists(st.sampled_from(ModelModality), min_size=1, unique=True).map(tuple)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The value, or none."""
    return st.none() | strategy


profiles = st.builds(
    ModelProfile,
    name=names,
    path=paths,
    digest=st.sampled_from(DIGESTS),
    architecture=maybe_texts,
    model_type=maybe_texts,
    family=maybe(st.sampled_from(NativeFamily)),
    kind=maybe(st.sampled_from(GenericModelKind)),
    modalities=modalities,
    requires_processor=st.booleans(),
    has_processor=st.booleans(),
    dtype=maybe(st.sampled_from(DTYPES)),
    weight_bytes=st.integers(0, 30 * GIB),
    parameter_count=counts,
    layer_count=st.integers(0, 200),
    hidden_size=st.integers(0, 2**15),
    intermediate_size=st.integers(0, 2**16),
    vocabulary_size=st.integers(0, 2**18),
    attention_heads=st.integers(0, 256),
    attention_width=st.integers(0, 2**15),
    linear_heads=st.integers(0, 64),
    linear_head_size=st.integers(0, 256),
    layer_bytes=st.lists(st.integers(0, GIB), max_size=4).map(tuple),
    embedding_bytes=st.integers(0, GIB),
    head_bytes=st.integers(0, GIB),
    expert_bytes=st.integers(0, GIB),
    layer_expert_bytes=st.lists(st.integers(0, GIB), max_size=4).map(tuple),
    expert_count=st.integers(0, 512),
    experts_per_token=st.integers(0, 16),
    kv_bytes_per_token=st.integers(0, 2**21),
    sliding_kv_bytes_per_token=st.integers(0, 2**21),
    sliding_window=maybe(st.integers(1, 2**15)),
    state_bytes_per_row=st.integers(0, 2**24),
    cross_kv_bytes_per_token=st.integers(0, 2**20),
    widest_kv_bytes_per_token=st.integers(0, 2**17),
    max_context_tokens=maybe(st.integers(1, 2**20)),
    has_chat_template=st.booleans(),
    has_gds_export=st.booleans(),
    gds_export_problem=maybe_texts,
    repo_id=maybe_texts,
    revision=maybe_texts,
    refs=st.lists(texts, max_size=2).map(tuple),
    unsafe_because=st.none() | st.just("a pickle"),
)

capability_profiles = st.builds(
    CapabilityProfile,
    support_level=st.sampled_from(SupportLevel),
    modalities=modalities,
    requires_processor=st.booleans(),
    supports_disk_cache=st.booleans(),
    supports_local_materialization=st.booleans(),
    supports_specialization=st.booleans(),
    details=details,
)

resolved_models = st.builds(
    ResolvedModel,
    reference=texts,
    source_kind=st.sampled_from(ModelSourceKind),
    normalized_name=texts,
    capabilities=capability_profiles,
    resolution_message=texts,
    model_path=maybe(paths),
    repo_id=maybe_texts,
    revision=maybe_texts,
    catalog_entry=maybe_texts,
    native_family=maybe(st.sampled_from(NativeFamily)),
    architecture=maybe_texts,
    model_type=maybe_texts,
    generic_model_kind=maybe(st.sampled_from(GenericModelKind)),
    digest=maybe(st.sampled_from(DIGESTS)),
)


@st.composite
def runtime_plans(draw: st.DrawFn, states: tuple[SpecializationState, ...] = tuple(SpecializationState)) -> RuntimePlan:
    """Any plan that the invariants allow, in one of these states."""
    state = draw(st.sampled_from(states))
    is_specialized = state is not SpecializationState.NOT_PLANNED
    planned = draw(st.lists(st.sampled_from(PassId), unique=True)) if is_specialized else []
    is_applied = state is SpecializationState.APPLIED
    applied = [pass_id for pass_id in planned if draw(st.booleans())] if is_applied else []
    backends = st.sampled_from(BackendId)
    return RuntimePlan(
        resolved_model=draw(resolved_models),
        backend_id=draw(backends if is_specialized else maybe(backends)),
        model_path=draw(maybe(paths)),
        support_level=draw(st.sampled_from(SupportLevel)),
        generic_model_kind=draw(maybe(st.sampled_from(GenericModelKind))),
        supports_disk_cache=draw(st.booleans()),
        supports_cpu_offload=draw(st.booleans()),
        supports_gpu_offload=draw(st.booleans()),
        specialization_enabled=is_specialized,
        specialization_applied=is_applied,
        specialization_provider_id=draw(texts) if is_specialized else None,
        specialization_state=state,
        reason=draw(texts),
        specialization_pass_ids=tuple(planned),
        applied_specialization_pass_ids=tuple(applied),
        fallback_reason=draw(texts) if state is SpecializationState.FALLBACK else None,
        details=draw(details),
    )


@st.composite
def runtime_configs(draw: st.DrawFn) -> RuntimeConfig:
    """Any options that do not contradict each other; a draw that does starts again from the defaults."""
    options: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "device": st.sampled_from([*DEVICE_IDS, "cuda"]),
                "backend": st.sampled_from(BackendId),
                "adapter_dir": st.just("adapter"),
                "draft_model": st.just("small"),
                "multimodal": st.booleans(),
                "use_specialization": st.booleans(),
                "use_cache": st.booleans(),
                "kv_cache_strategy": st.sampled_from(KVCacheStrategy),
                "strategy_selector_profile": st.sampled_from(SELECTOR_PROFILES),
                "kv_cache_window_tokens": st.integers(1, 4096),
                "dense_projection_chunk_rows": st.integers(1, 4096),
                "offload_cpu_layers": st.integers(0, 8),
                "offload_cpu_policy": st.sampled_from([*CPU_OFFLOAD_POLICIES, "exact:0", "exact:1-2,0"]),
                "offload_gpu_layers": st.integers(0, 8),
            },
        )
    )
    try:
        return RuntimeConfig(**options)
    except InvalidOption:
        return RuntimeConfig(device=options.get("device"))


generation_configs = st.builds(
    GenerationConfig,
    max_new_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_p=maybe(st.floats(0, 1, exclude_min=True)),
    top_k=maybe(st.integers(1, 2**31 - 1)),
    seed=maybe(st.integers(0, 2**63 - 1)),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), max_size=4).map(tuple),
)

devices = st.builds(
    Device,
    device_id=st.sampled_from(DEVICE_IDS),
    name=texts,
    memory_bytes=st.integers(0, 64 * GIB),
    compute_capability=maybe_texts,
    dtypes=st.lists(st.sampled_from(DTYPES), unique=True).map(tuple),
    memory_rate=maybe(ratios),
    arithmetic=st.dictionaries(st.sampled_from(DTYPES), ratios),
)


KINDS = [*(kind.value for kind in GenericModelKind), "voxtral"]


def offers(keys: Any) -> st.SearchStrategy[Any]:
    """Some of these, each offered (null) or lacking for a reason."""
    return st.dictionaries(st.sampled_from(list(keys)), st.none() | st.just("not here"))


capabilities = st.builds(
    Capabilities,
    node=names,
    slots=st.integers(1, 4),
    devices=st.lists(devices, min_size=1, max_size=3, unique_by=lambda device: device.device_id).map(tuple),
    host_memory_bytes=st.integers(0, 128 * GIB),
    backends=offers([backend.value for backend in BackendId]),
    passes=offers(PassId),
    kv_strategies=offers([strategy.value for strategy in KVCacheStrategy]),
    kinds=offers(KINDS),
    quantizations=offers(QUANTIZATION_LIBRARIES),
    modalities=offers(ModelModality),
    no_adapters_because=maybe(st.just("not here")),
    models=st.lists(profiles, max_size=2).map(tuple),
    cache_disk=maybe(st.builds(CacheDisk, path=texts, total_bytes=counts, write_rate=maybe(ratios), read_rate=maybe(ratios))),
    may_download=st.booleans(),
    labels=st.dictionaries(st.sampled_from(["zone", "rack"]), st.sampled_from(["a", "b"]) | st.floats(0, 4)),
    versions=details,
)

live_states = st.builds(
    LiveState,
    device_free_bytes=st.fixed_dictionaries({}, optional=dict.fromkeys(DEVICE_IDS, st.integers(0, 64 * GIB))),
    host_free_bytes=counts,
    cache_free_bytes=st.integers(0, 1024 * GIB),
    warm_model=maybe(st.sampled_from(DIGESTS)),
    laid_out=st.frozensets(st.sampled_from(DIGESTS), max_size=2),
    begun_bytes=st.dictionaries(st.sampled_from(DIGESTS), counts, max_size=1),
)

CLAUSES: dict[str, st.SearchStrategy[Any]] = {
    "passes": st.lists(st.sampled_from(PassId), min_size=1, max_size=3, unique=True).map(tuple),
    "kv_cache_strategy": st.sampled_from([strategy.value for strategy in KVCacheStrategy]),
    "device": st.sampled_from([*DEVICE_IDS, "cuda"]),
    "dtype": st.sampled_from(DTYPES),
    "kind": st.sampled_from(KINDS),
    "adapter": st.just(value=True),
    "quantization": st.sampled_from(list(QUANTIZATION_LIBRARIES)),
    "memory_bytes": st.integers(1, 64 * GIB),
    "offloaded_bytes": st.integers(1, 64 * GIB),
    "cache_bytes": st.integers(1, 2**40),
    "where": st.sampled_from(EXPRESSIONS),
    "modalities": modalities,
    "model_digest": st.sampled_from(DIGESTS),
    "download": st.just("org/name"),
}


@st.composite
def requirements(draw: st.DrawFn) -> Requirements:
    """Any requirements: each clause made or not."""
    chosen = draw(st.fixed_dictionaries({}, optional=CLAUSES))
    if "model_digest" in chosen:
        chosen.pop("download", None)
    return Requirements(backend_id=draw(st.sampled_from(BackendId)).value, **chosen)


row_errors = st.builds(RowError, code=texts, message=texts)
row_results = st.builds(
    RowResult,
    row=counts,
    text=texts,
    finish_reason=maybe_texts,
    prompt_tokens=counts,
    completion_tokens=counts,
) | st.builds(RowResult, row=counts, error=row_errors)
outcomes: st.SearchStrategy[PassOutcome] = st.one_of(
    st.builds(Applied, evidence=texts),
    st.builds(NotNeeded, reason=texts),
    st.builds(Failed, reason=texts, error_type=maybe_texts),
)
pass_outcomes = st.dictionaries(st.sampled_from(PassId), outcomes)
estimates = st.builds(MemoryEstimate, **dict.fromkeys((item.name for item in fields(MemoryEstimate)), counts))
layer_numbers = st.lists(st.integers(0, 99), max_size=3).map(tuple)
placements = st.builds(
    Placement,
    device_id=st.sampled_from(DEVICE_IDS),
    tier=st.sampled_from(Tier),
    kv_cache_strategy=st.sampled_from(KVCacheStrategy),
    micro_batch=st.integers(1, 64),
    estimate=estimates,
    kv_details=details,
    refused=st.lists(
        st.builds(
            RefusedTier,
            tier=st.sampled_from(Tier),
            device_id=texts,
            reason=texts,
            needed_bytes=counts,
            free_bytes=counts,
            short_of=maybe_texts,
            estimate=st.none() | estimates,
        ),
        max_size=2,
    ).map(tuple),
    host_layers=layer_numbers,
    disk_layers=layer_numbers,
    vocabulary_on_disk=st.booleans(),
)
work_rows = st.builds(
    WorkRow,
    row=counts,
    custom_id=texts,
    prompt=maybe_texts,
    messages=maybe(st.lists(json_objects, max_size=2).map(tuple)),
    generation=generation_configs,
)
measurements = st.dictionaries(names, ratios, max_size=3)
row_numbers = st.lists(counts, max_size=5).map(tuple)
reports = st.builds(AttemptReport, runtime_plan=runtime_plans(), placement=json_objects, measured=json_objects)

device_speeds = st.builds(DeviceSpeed, memory_rate=ratios, arithmetic=measurements)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Execute,
        plan_id=texts,
        attempt=counts,
        model_dir=texts,
        cache_dir=maybe_texts,
        runtime_plan=runtime_plans(),
        profile=profiles,
        config=runtime_configs(),
        placement=placements,
        rows=st.lists(work_rows, max_size=3).map(tuple),
    ),
    st.builds(Stop),
    st.builds(Hello, pid=counts, versions=details),
    st.builds(Speed, devices=st.dictionaries(texts, device_speeds, max_size=2)),
    st.builds(Loaded, seconds=ratios, was_warm=st.booleans()),
    st.builds(BatchStarted, rows=row_numbers),
    st.builds(Progress, stage=texts, tokens=counts),
    st.builds(BatchDone, results=st.lists(row_results, max_size=3).map(tuple), outcomes=pass_outcomes, measured=measurements),
    st.builds(SpecializationFailed, outcomes=pass_outcomes, reason=texts, error_type=texts),
    st.builds(Finished, measured=measurements),
    st.builds(Stopped),
    st.builds(AttemptFailed, stage=texts, code=texts, message=texts, error_type=texts, is_permanent=st.booleans()),
)
