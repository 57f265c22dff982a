"""What do store tests store? Small jobs, workers and answers, made without any of the service's other parts."""

import itertools
import uuid
from pathlib import PurePosixPath
from typing import Any

from ollm_service.core.capabilities import Capabilities, Device, LiveState
from ollm_service.core.leasing import Assignment, AttemptReport, RowError, RowResult
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.plan import (
    BackendId,
    CapabilityProfile,
    GenericModelKind,
    ModelSourceKind,
    NativeFamily,
    PassId,
    ResolvedModel,
    RuntimePlan,
    SpecializationState,
    SupportLevel,
)
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements, class_id
from ollm_service.store.database import Store
from ollm_service.store.jobs import NewJob, NewPlan, NewRow
from ollm_service.store.views import PlanView

TENANT = "default"
DIGEST = "d" * 64
PROFILE = ModelProfile(
    name="tiny",
    path=PurePosixPath("tiny"),
    digest=DIGEST,
    architecture="LlamaForCausalLM",
    model_type="llama",
    family=NativeFamily.LLAMA,
    kind=GenericModelKind.CAUSAL_LM,
    dtype="float32",
    weight_bytes=1_000,
)
RESOLVED = ResolvedModel(
    reference="tiny",
    source_kind=ModelSourceKind.LOCAL_PATH,
    normalized_name="tiny",
    capabilities=CapabilityProfile(support_level=SupportLevel.OPTIMIZED, supports_specialization=True),
    resolution_message="found",
    model_path=PurePosixPath("tiny"),
    architecture="LlamaForCausalLM",
    digest=DIGEST,
)
PLAN = RuntimePlan(
    resolved_model=RESOLVED,
    backend_id=BackendId.OPTIMIZED_NATIVE,
    model_path=PurePosixPath("tiny"),
    support_level=SupportLevel.OPTIMIZED,
    generic_model_kind=GenericModelKind.CAUSAL_LM,
    supports_disk_cache=True,
    supports_cpu_offload=False,
    supports_gpu_offload=False,
    specialization_enabled=True,
    specialization_applied=False,
    specialization_provider_id="llama-native",
    specialization_state=SpecializationState.PLANNED,
    reason="because",
    specialization_pass_ids=(PassId.DISK_CACHE, PassId.MLP_CHUNKING),
    details={"a": "b"},
)
APPLIED = PLAN.evolve(
    specialization_state=SpecializationState.APPLIED,
    specialization_applied=True,
    applied_specialization_pass_ids=(PassId.MLP_CHUNKING,),
    details={"pass_mlp_chunking": "applied (12 chunks)"},
)
FALLBACK = PLAN.evolve(
    backend_id=BackendId.TRANSFORMERS_GENERIC,
    support_level=SupportLevel.GENERIC,
    supports_disk_cache=False,
    specialization_state=SpecializationState.FALLBACK,
    fallback_reason="the cache disk is full",
)
REPORT = AttemptReport(runtime_plan=APPLIED, placement={"device_id": "cpu"}, measured={"load_seconds": 1.5})
LIVE = LiveState(device_free_bytes={"cpu": 10**9}, host_free_bytes=10**9)
_numbers = itertools.count()


def requirements(tag: str = "") -> Requirements:
    """Requirements of a class of their own for each tag."""
    return Requirements(backend_id="optimized-native", model_digest=DIGEST, where=f'tag == "{tag}"' if tag else None)


def class_of(tag: str = "") -> str:
    """The class of those requirements."""
    return class_id(requirements(tag))


def new_job(*sizes: int, tag: str = "", invalid: tuple[int, ...] = (), **changes: Any) -> NewJob:
    """A job with a plan of each size; `invalid` rows are wrong by themselves. The first plan's size is 2 unless given."""
    number, sizes = next(_numbers), sizes or (2,)
    bounds = list(itertools.accumulate(sizes, initial=0))
    config = RuntimeConfig()
    wrong = RowError(code="prompt_missing", message="there is no prompt")
    defaults: dict[str, Any] = {
        "job_id": f"job_{number:06}_{uuid.uuid4().hex[:8]}",
        "model": "tiny",
        "rows": [
            NewRow(row=row, custom_id=f"r{row}", request={"prompt": f"say {row}"}, error=wrong if row in invalid else None)
            for row in range(bounds[-1])
        ],
        "config": config,
        "generation": GenerationConfig(max_new_tokens=7),
        "body_digest": "digest",
        "inventory_seq": 1,
    }
    job = defaults | changes
    plans = [
        NewPlan(
            plan_id=f"plan_{job['job_id'][4:]}_{index}",
            rows=tuple(range(start, end)),
            runtime_plan=PLAN,
            profile=PROFILE,
            config=config,
            requirements=requirements(tag),
        )
        for index, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
    return NewJob(**({"plans": plans} | job))


def capabilities(node: str = "north", **changes: Any) -> Capabilities:
    """A CPU worker that has the model."""
    device = Device(device_id="cpu", name="cpu", memory_bytes=10**9)
    values: dict[str, Any] = {
        "node": node,
        "slots": 1,
        "devices": (device,),
        "host_memory_bytes": 10**9,
        "backends": {"optimized-native": None},
        "passes": {PassId.MLP_CHUNKING: None, PassId.DISK_CACHE: "no writable cache directory"},
        "kv_strategies": {"resident": None},
        "models": (PROFILE,),
    }
    return Capabilities(**(values | changes))


def new_worker(store: Store, node: str = "north", **changes: Any) -> str:
    """Register a worker and return its id."""
    worker_id = f"wkr_{node}_{uuid.uuid4().hex[:8]}"
    store.leases.register(worker_id, capabilities(node, **changes), LIVE, pid=1)
    return worker_id


def new_lease() -> str:
    """A fresh lease id."""
    return str(uuid.uuid4())


def claim(store: Store, worker_id: str, *tags: str) -> Assignment | None:
    """Claim from the classes of these tags (the plain class unless given) under a fresh lease."""
    return store.leases.claim(worker_id, new_lease(), [class_of(tag) for tag in tags or ("",)])


def must_claim(store: Store, worker_id: str, *tags: str) -> Assignment:
    """Claim what is known to be there."""
    assignment = claim(store, worker_id, *tags)
    assert assignment is not None, "nothing to claim"
    return assignment


def answers(*rows: int) -> list[RowResult]:
    """A successful result for each row."""
    return [RowResult(row=row, text=f"said {row}", finish_reason="stop", prompt_tokens=3, completion_tokens=2) for row in rows]


def plans_of(store: Store, job: NewJob) -> list[PlanView]:
    """The job's plans, in order."""
    return list(store.jobs.plans(job.job_id, job.tenant_id))


def plan_of(store: Store, job: NewJob) -> PlanView:
    """The job's only plan."""
    (plan,) = plans_of(store, job)
    return plan
