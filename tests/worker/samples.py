"""What do the tests of the worker run? One profile, its plan, and rows, by the real planner."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from ollm_service.core.estimates import MemoryEstimate
from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import GenerationConfig, KVCacheStrategy, RuntimeConfig
from ollm_service.core.placement import Placement, Tier
from ollm_service.core.plan import GenericModelKind, NativeFamily, RuntimePlan
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.resolution import HeldModel
from ollm_service.core.wire import Execute

PROFILE = ModelProfile(
    name="tiny",
    path=PurePosixPath("tiny"),
    digest="d" * 64,
    architecture="LlamaForCausalLM",
    model_type="llama",
    family=NativeFamily.LLAMA,
    kind=GenericModelKind.CAUSAL_LM,
    dtype="float32",
    weight_bytes=1_000_000,
    parameter_count=250_000,
    layer_count=2,
    hidden_size=64,
    intermediate_size=128,
    vocabulary_size=100,
    attention_heads=4,
    kv_bytes_per_token=1_024,
    max_context_tokens=512,
)


def plan_of(config: RuntimeConfig) -> RuntimePlan:
    """The plan for the sample model, which one worker holds."""
    return plan("tiny", [HeldModel(profile=PROFILE, workers=("w",))], config).plan


def rows_of(prompts: Sequence[str]) -> tuple[WorkRow, ...]:
    """One row a prompt."""
    generation = GenerationConfig(max_new_tokens=8)
    return tuple(
        WorkRow(row=number, custom_id=f"row-{number}", prompt=prompt, messages=None, generation=generation)
        for number, prompt in enumerate(prompts)
    )


def order_of(*prompts: str, micro_batch: int = 4) -> Execute:
    """An order to a runner, as the worker would give it."""
    config = RuntimeConfig()
    estimate = MemoryEstimate(weights=1, kv=1, activations=1, logits=1, workspace=1, disk=0)
    placement = Placement(
        device_id="cpu",
        tier=Tier.ALL_ON_DEVICE,
        kv_cache_strategy=KVCacheStrategy.RESIDENT,
        micro_batch=micro_batch,
        estimate=estimate,
    )
    return Execute(
        plan_id="plan_1",
        attempt=1,
        model_dir="/models/tiny",
        cache_dir=None,
        runtime_plan=plan_of(config),
        profile=PROFILE,
        config=config,
        placement=placement,
        rows=rows_of(prompts),
    )
