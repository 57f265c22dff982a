"""What may a user choose about how a model runs and how it generates, and which choices are wrong?"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import NoneType
from typing import Any, Self, get_args

from ollm_service.core.errors import InvalidOption, shown
from ollm_service.core.plan import BackendId


class KVCacheStrategy(StrEnum):
    """Where the keys and values of past tokens live."""

    RESIDENT = "resident"
    PAGED = "paged"
    QUANTIZED_COLD_TIER = "quantized-cold-tier"
    SLIDING_WINDOW_RING_BUFFER = "sliding-window-ring-buffer"


WITHDRAWN_KV_STRATEGIES = ("chunked", "streamed-segmented", "log-structured-journal", "tiered-write-back")
SELECTOR_PROFILES = ("balanced", "latency", "capacity", "bounded-window")
KV_LIFECYCLES = ("runtime-scoped", "persistent")
KV_ADAPTATION_MODES = ("disabled", "observe-only", "automatic")
CPU_OFFLOAD_POLICIES = ("auto", "prefix", "suffix", "middle-band")
EXACT_LAYERS = "exact:0,3,5-7"  # how layers are named by number, from 0
DEVICES = ("cpu", "cuda", "cuda:N", "mps")
MOST_STOP_STRINGS = 4
# Beyond any real count, and within what databases and tensors index with.
LARGEST_COUNT = 2**31 - 1
MOST_EXACT_LAYERS = 10_000
_EXACT = re.compile(r"exact:(\d{1,4}(?:-\d{1,4})?(?:,\d{1,4}(?:-\d{1,4})?){0,999})", re.ASCII)
_DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """How the user wants the model to run; every default leaves the choice to the planner or the worker.

    A device, a backend, a KV strategy or window, chunk rows and offloaded layers are hard requirements when set; the rest is
    preference. The `draft_model` guesses tokens, and changes none. An `offload_cpu_policy` that names layers, such as
    `exact:0,3,5-7`, says how many there are, too. Raises InvalidOption naming the field and the allowed values.
    """

    device: str | None = None
    backend: str | None = None
    adapter_dir: str | None = None
    draft_model: str | None = None
    multimodal: bool = False
    use_specialization: bool = True
    use_cache: bool = True
    kv_cache_strategy: str | None = None
    strategy_selector_profile: str = "balanced"
    kv_cache_lifecycle: str = "runtime-scoped"
    kv_cache_adaptation_mode: str = "observe-only"
    kv_cache_window_tokens: int | None = None
    dense_projection_chunk_rows: int | None = None
    offload_cpu_layers: int = 0
    offload_cpu_policy: str = "auto"
    offload_gpu_layers: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        if self.device is not None and not _DEVICE.fullmatch(self.device):
            raise InvalidOption("device", f"`{shown(self.device)}` is not known", allowed=DEVICES)
        _one_of("backend", self.backend, tuple(BackendId))
        if self.kv_cache_strategy in WITHDRAWN_KV_STRATEGIES:
            raise InvalidOption("kv_cache_strategy", f"`{self.kv_cache_strategy}` is not offered; use `paged`")
        _one_of("kv_cache_strategy", self.kv_cache_strategy, tuple(KVCacheStrategy))
        _one_of("strategy_selector_profile", self.strategy_selector_profile, SELECTOR_PROFILES)
        _one_of("kv_cache_lifecycle", self.kv_cache_lifecycle, KV_LIFECYCLES)
        _one_of("kv_cache_adaptation_mode", self.kv_cache_adaptation_mode, KV_ADAPTATION_MODES)
        self._check_policy()
        _at_least("kv_cache_window_tokens", self.kv_cache_window_tokens, 1)
        _at_least("dense_projection_chunk_rows", self.dense_projection_chunk_rows, 1)
        _at_least("offload_cpu_layers", self.offload_cpu_layers, 0)
        _at_least("offload_gpu_layers", self.offload_gpu_layers, 0)
        self._check_combinations()

    def _check_policy(self) -> None:
        if not self.offload_cpu_policy.startswith("exact"):
            _one_of("offload_cpu_policy", self.offload_cpu_policy, (*CPU_OFFLOAD_POLICIES, EXACT_LAYERS))
            return
        count = len(self.exact_cpu_layers)
        if not count:
            problem = f"`{shown(self.offload_cpu_policy)}` names no layers, or one of them twice, or backwards"
            raise InvalidOption("offload_cpu_policy", problem, allowed=(*CPU_OFFLOAD_POLICIES, EXACT_LAYERS))
        if self.offload_cpu_layers not in (0, count):
            raise InvalidOption(
                "offload_cpu_layers", f"is {self.offload_cpu_layers}, and offload_cpu_policy names {count} layers"
            )
        object.__setattr__(self, "offload_cpu_layers", count)

    def _check_combinations(self) -> None:
        if self.backend == BackendId.OPTIMIZED_NATIVE and not self.use_specialization:
            raise InvalidOption("use_specialization", "false contradicts backend `optimized-native`")
        if self.kv_cache_lifecycle == "persistent" and self.kv_cache_strategy == KVCacheStrategy.RESIDENT:
            raise InvalidOption("kv_cache_lifecycle", "`persistent` contradicts kv_cache_strategy `resident`")
        if not self.use_cache and self.demanded_kv_strategy not in (None, KVCacheStrategy.RESIDENT):
            raise InvalidOption("use_cache", f"false contradicts KV cache strategy `{self.demanded_kv_strategy}`")
        windowed = (None, KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER)
        if self.kv_cache_window_tokens is not None and self.kv_cache_strategy not in windowed:
            raise InvalidOption("kv_cache_window_tokens", "needs kv_cache_strategy `sliding-window-ring-buffer`")
        if self.offload_cpu_layers and self.offload_gpu_layers:
            raise InvalidOption("offload_gpu_layers", "cannot be combined with offload_cpu_layers")
        if self.offload_cpu_layers and self.device == "cpu":
            raise InvalidOption("offload_cpu_layers", "has no meaning on device `cpu`")

    @property
    def exact_cpu_layers(self) -> tuple[int, ...]:
        """The layers that are to be kept in host memory by number, in rising order; none where they were not named."""
        found = _EXACT.fullmatch(self.offload_cpu_policy)
        if found is None:
            return ()
        spans = [part.partition("-") for part in found[1].split(",")]
        ranges = [range(int(first), int(last or first) + 1) for first, _, last in spans]
        if not all(ranges) or sum(map(len, ranges)) > MOST_EXACT_LAYERS:
            return ()
        layers = sorted(layer for span in ranges for layer in span)
        return tuple(layers) if len(set(layers)) == len(layers) else ()

    @property
    def demanded_kv_strategy(self) -> KVCacheStrategy | None:
        """The strategy that was asked for, by name or by bounding the window; None leaves the choice to placement."""
        if self.kv_cache_strategy is not None:
            return KVCacheStrategy(self.kv_cache_strategy)
        is_bounded = self.strategy_selector_profile == "bounded-window" or self.kv_cache_window_tokens is not None
        return KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER if is_bounded else None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build it from a request's `runtime` object; null means `not set`. Raises InvalidOption."""
        return cls(**_known(cls, data, "runtime"))

    def as_dict(self) -> dict[str, Any]:
        """Every field that differs from its default."""
        return _changed(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """How tokens are chosen. Temperature 0 is greedy. Raises InvalidOption naming the field and the allowed values."""

    max_new_tokens: int = 500
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        given: Any = self.stop  # from a request, it may be one string or anything else
        stop = (given,) if isinstance(given, str) else given
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text and _is_unicode(text) for text in stop):
            raise InvalidOption("stop", f"must be up to {MOST_STOP_STRINGS} non-empty strings")
        if len(stop) > MOST_STOP_STRINGS:
            raise InvalidOption("stop", f"has {len(stop)} strings, at most {MOST_STOP_STRINGS} are allowed")
        object.__setattr__(self, "stop", tuple(stop))
        _check_types(self, but=("stop",))
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        _at_least("top_k", self.top_k, 1)
        if not 0 <= self.temperature <= 100:
            raise InvalidOption("temperature", "must be between 0 (greedy) and 100")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidOption("top_p", "must be above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidOption("seed", "must be between 0 and 2^63 - 1")

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build it from a request's `generation` object; null means `not set`. Raises InvalidOption."""
        return cls(**_known(cls, data, "generation"))

    def merged_with(self, data: Mapping[str, Any]) -> Self:
        """This configuration with a row's own settings on top. Raises InvalidOption."""
        return type(self)(**(_changed(self) | _known(type(self), data, "generation")))

    def as_dict(self) -> dict[str, Any]:
        """Every field that differs from its default."""
        changed = _changed(self)
        return changed | {"stop": list(self.stop)} if self.stop else changed


def _known(cls: type, data: Mapping[str, Any], param: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise InvalidOption(param, "must be an object")
    names = [item.name for item in fields(cls)]
    for name in data:
        if name not in names:
            raise InvalidOption(f"{param}.{shown(name)}", "is not an option", allowed=names)
    return {name: value for name, value in data.items() if value is not None}


def _changed(config: Any) -> dict[str, Any]:
    return {item.name: value for item in fields(config) if (value := getattr(config, item.name)) != item.default}


_WORDS: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _check_types(config: Any, *, but: Collection[str] = ()) -> None:
    for item in fields(config):
        value, allowed = getattr(config, item.name), get_args(item.type) or (item.type,)
        if item.name in but or (value is None and NoneType in allowed):
            continue
        wanted = next(kind for kind in allowed if kind is not NoneType)
        accepted = (int, float) if wanted is float else (wanted,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
            raise InvalidOption(item.name, f"must be {_WORDS[wanted]}, not {shown(value)}")
        if isinstance(value, str) and not value.strip():
            raise InvalidOption(item.name, "must not be blank")


def _one_of(param: str, value: str | None, allowed: Collection[str]) -> None:
    if value is not None and value not in tuple(allowed):
        raise InvalidOption(param, f"`{shown(value)}` is not known", allowed=[str(item) for item in allowed])


def _at_least(param: str, value: int | None, least: int) -> None:
    if value is not None and not least <= value <= LARGEST_COUNT:
        raise InvalidOption(param, f"must be between {least} and {LARGEST_COUNT:,}")


def _is_unicode(text: str) -> bool:
    """Whether no lone surrogate is in it: JSON can carry one, a tokenizer cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
