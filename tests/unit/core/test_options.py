"""Which options are wrong, and does the refusal name the field and the allowed values?"""

from typing import Any

import pytest

from ollm_service.core.errors import InvalidOption
from ollm_service.core.options import GenerationConfig, KVCacheStrategy, RuntimeConfig

HUGE = 10**400


def test_defaults_are_the_published_ones() -> None:
    """Nothing asked for: every default as documented."""
    runtime, generation = RuntimeConfig(), GenerationConfig()
    assert runtime.as_dict() == generation.as_dict() == {}
    assert (runtime.strategy_selector_profile, runtime.kv_cache_lifecycle) == ("balanced", "runtime-scoped")
    assert (runtime.kv_cache_adaptation_mode, runtime.offload_cpu_policy) == ("observe-only", "auto")
    assert (generation.max_new_tokens, generation.temperature) == (500, 0.0)
    assert generation.is_greedy
    assert not GenerationConfig(temperature=0.7).is_greedy


@pytest.mark.parametrize(
    ("options", "param", "problem"),
    [
        ({"backend": "vllm"}, "backend", "optimized-native, transformers-generic"),
        ({"backend": ""}, "backend", "blank"),
        ({"backend": 7}, "backend", "must be a text"),
        ({"device": "gpu"}, "device", "cpu, cuda, cuda:N, mps"),
        ({"device": "cuda:x"}, "device", "not known"),
        ({"device": "cuda:0 "}, "device", "not known"),
        ({"device": "cuda:\u0663"}, "device", "not known"),
        ({"device": True}, "device", "must be a text"),
        ({"multimodal": "yes"}, "multimodal", "true or false"),
        ({"multimodal": 1}, "multimodal", "true or false"),
        ({"use_specialization": False, "backend": "optimized-native"}, "use_specialization", "contradicts"),
        ({"kv_cache_strategy": "magic"}, "kv_cache_strategy", "resident, paged, quantized-cold-tier, sliding-window"),
        ({"kv_cache_strategy": "chunked"}, "kv_cache_strategy", "use `paged`"),
        ({"kv_cache_strategy": "streamed-segmented"}, "kv_cache_strategy", "use `paged`"),
        ({"kv_cache_strategy": "log-structured-journal"}, "kv_cache_strategy", "use `paged`"),
        ({"kv_cache_strategy": "tiered-write-back"}, "kv_cache_strategy", "use `paged`"),
        ({"strategy_selector_profile": "fast"}, "strategy_selector_profile", "balanced, latency, capacity, bounded-window"),
        ({"kv_cache_lifecycle": "forever"}, "kv_cache_lifecycle", "runtime-scoped, persistent"),
        ({"kv_cache_lifecycle": "persistent", "kv_cache_strategy": "resident"}, "kv_cache_lifecycle", "contradicts"),
        ({"kv_cache_adaptation_mode": "on"}, "kv_cache_adaptation_mode", "disabled, observe-only, automatic"),
        ({"kv_cache_window_tokens": 0}, "kv_cache_window_tokens", "between 1"),
        ({"kv_cache_window_tokens": 5, "kv_cache_strategy": "paged"}, "kv_cache_window_tokens", "sliding-window-ring-buffer"),
        ({"kv_cache_window_tokens": 5, "kv_cache_strategy": "resident"}, "kv_cache_window_tokens", "needs"),
        ({"use_cache": False, "kv_cache_strategy": "paged"}, "use_cache", "contradicts"),
        ({"use_cache": False, "kv_cache_window_tokens": 5}, "use_cache", "contradicts"),
        ({"dense_projection_chunk_rows": 0}, "dense_projection_chunk_rows", "between 1"),
        ({"dense_projection_chunk_rows": 2**31}, "dense_projection_chunk_rows", "between 1 and 2,147,483,647"),
        ({"dense_projection_chunk_rows": 1.0}, "dense_projection_chunk_rows", "whole number"),
        ({"offload_cpu_layers": -1}, "offload_cpu_layers", "between 0"),
        ({"offload_cpu_layers": True}, "offload_cpu_layers", "whole number, not True"),
        ({"offload_cpu_layers": 1, "device": "cpu"}, "offload_cpu_layers", "no meaning"),
        ({"offload_cpu_layers": 1, "offload_gpu_layers": 1}, "offload_gpu_layers", "cannot be combined"),
        ({"offload_cpu_policy": "best"}, "offload_cpu_policy", "auto, prefix, suffix, middle-band"),
        ({"offload_cpu_policy": "exact:"}, "offload_cpu_policy", "exact:0,3,5-7"),
        ({"offload_cpu_policy": "exact:1,1"}, "offload_cpu_policy", "twice"),
        ({"offload_cpu_policy": "exact:3-1"}, "offload_cpu_policy", "backwards"),
        ({"offload_cpu_policy": "exact:-1"}, "offload_cpu_policy", "names no layers"),
        ({"offload_cpu_policy": "exact:0-99999"}, "offload_cpu_policy", "names no layers"),
        ({"offload_cpu_policy": "exact:0,2", "offload_cpu_layers": 3}, "offload_cpu_layers", "names 2 layers"),
        ({"offload_cpu_policy": "exact:0", "device": "cpu"}, "offload_cpu_layers", "no meaning"),
        ({"offload_gpu_layers": -1}, "offload_gpu_layers", "between 0"),
        ({"turbo": 1}, "runtime.turbo", "is not an option"),
        ([], "runtime", "must be an object"),
    ],
)
def test_wrong_runtime_options_are_refused(options: Any, param: str, problem: str) -> None:
    """Each wrong option is a 400 that names the field and, where there are some, the allowed values."""
    with pytest.raises(InvalidOption) as refusal:
        RuntimeConfig.from_dict(options)
    assert refusal.value.param == param
    assert problem in refusal.value.message
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_option")


def test_layers_that_are_named_say_how_many_they_are() -> None:
    """A policy with numbers is a demand of its own, and comes back from its dictionary."""
    config = RuntimeConfig.from_dict({"offload_cpu_policy": "exact:5-7,0,3"})
    assert (config.offload_cpu_layers, config.exact_cpu_layers) == (5, (0, 3, 5, 6, 7))
    assert RuntimeConfig.from_dict(config.as_dict()) == config
    assert RuntimeConfig(offload_cpu_policy="suffix").exact_cpu_layers == ()


@pytest.mark.parametrize(
    ("options", "param", "problem"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens", "between 1"),
        ({"max_new_tokens": 2**31}, "max_new_tokens", "between 1"),
        ({"max_new_tokens": HUGE}, "max_new_tokens", "between 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens", "whole number"),
        ({"max_new_tokens": True}, "max_new_tokens", "whole number"),
        ({"max_new_tokens": "9"}, "max_new_tokens", "whole number, not 9"),
        ({"temperature": -0.1}, "temperature", "between 0"),
        ({"temperature": float("nan")}, "temperature", "between 0"),
        ({"temperature": float("inf")}, "temperature", "between 0"),
        ({"temperature": HUGE}, "temperature", "between 0"),
        ({"temperature": False}, "temperature", "a number"),
        ({"temperature": [HUGE]}, "temperature", "a number, not a list"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.1}, "top_p", "at most 1"),
        ({"top_p": float("nan")}, "top_p", "above 0"),
        ({"top_k": 0}, "top_k", "between 1"),
        ({"seed": -1}, "seed", "between 0"),
        ({"seed": 2**63}, "seed", "between 0"),
        ({"seed": 1.0}, "seed", "whole number"),
        ({"stop": 7}, "stop", "non-empty strings"),
        ({"stop": ""}, "stop", "non-empty strings"),
        ({"stop": ["a", ""]}, "stop", "non-empty strings"),
        ({"stop": ["a", None]}, "stop", "non-empty strings"),
        ({"stop": {"a": 1}}, "stop", "non-empty strings"),
        ({"stop": ["\ud800"]}, "stop", "non-empty strings"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"n": 2}, "generation.n", "is not an option"),
        ("greedy", "generation", "must be an object"),
    ],
)
def test_wrong_generation_options_are_refused(options: Any, param: str, problem: str) -> None:
    """Booleans are no numbers, NaN is no temperature, and a huge number is refused rather than overflowed."""
    with pytest.raises(InvalidOption) as refusal:
        GenerationConfig.from_dict(options)
    assert refusal.value.param == param
    assert problem in refusal.value.message


def test_a_refusal_repeats_hostile_input_short_and_printable() -> None:
    """Neither a long key nor a strange value comes back as it was sent."""
    for options in ({"\ud800" * 10_000: 1}, {"backend": "x\n" * 10_000}, {"offload_cpu_policy": "\u202e" * 500}):
        with pytest.raises(InvalidOption) as refusal:
            RuntimeConfig.from_dict(options)
        assert refusal.value.message.isprintable()
        assert len(refusal.value.message) < 1000
    with pytest.raises(InvalidOption, match="not a int"):
        RuntimeConfig.from_dict({"device": HUGE})


def test_null_means_not_set() -> None:
    """A null leaves the default."""
    assert RuntimeConfig.from_dict({"backend": None, "offload_cpu_layers": None}) == RuntimeConfig()
    assert GenerationConfig.from_dict({"max_new_tokens": None, "stop": None}) == GenerationConfig()


def test_good_options_pass() -> None:
    """The edges of every range are inside."""
    runtime = RuntimeConfig.from_dict({"device": "cuda:12", "kv_cache_strategy": "paged", "dense_projection_chunk_rows": 1})
    assert runtime.as_dict() == {"device": "cuda:12", "kv_cache_strategy": "paged", "dense_projection_chunk_rows": 1}
    edges = {"max_new_tokens": 1, "temperature": 100, "top_p": 1, "top_k": 1, "seed": 2**63 - 1, "stop": "\n"}
    assert GenerationConfig.from_dict(edges).as_dict() == {**edges, "stop": ["\n"]}


def test_a_row_overrides_its_job() -> None:
    """A row's own settings win, back to a default too; null and absent ones leave the job's."""
    job = GenerationConfig(max_new_tokens=10, temperature=0.5, stop=("x",))
    row = job.merged_with({"temperature": 0, "max_new_tokens": None, "seed": 3})
    assert row == GenerationConfig(max_new_tokens=10, seed=3, stop=("x",))
    with pytest.raises(InvalidOption):
        job.merged_with({"logprobs": True})


@pytest.mark.parametrize(
    ("config", "strategy"),
    [
        (RuntimeConfig(), None),
        (RuntimeConfig(strategy_selector_profile="capacity"), None),
        (RuntimeConfig(kv_cache_strategy="resident"), KVCacheStrategy.RESIDENT),
        (RuntimeConfig(kv_cache_strategy="paged"), KVCacheStrategy.PAGED),
        (RuntimeConfig(kv_cache_window_tokens=9), KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER),
        (RuntimeConfig(strategy_selector_profile="bounded-window"), KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER),
        (RuntimeConfig(strategy_selector_profile="bounded-window", kv_cache_strategy="paged"), KVCacheStrategy.PAGED),
    ],
)
def test_bounding_the_window_demands_the_sliding_window(config: RuntimeConfig, strategy: KVCacheStrategy | None) -> None:
    """A window is asked for by its size or its profile as much as by the strategy's name."""
    assert config.demanded_kv_strategy is strategy
