"""What does a worker offer, and what has it free right now?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ollm_service.core.plan import GenericModelKind, ModelModality, PassId
from ollm_service.core.profile import ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One place where a model can run. `device_id` is torch's name: `cpu`, `cuda:0`, `mps`. Memory in bytes.

    `memory_rate` is in bytes per second and `arithmetic` in floating-point operations per second by element type, as probed by
    the worker's runner once it was up.
    """

    device_id: str
    name: str
    memory_bytes: int
    compute_capability: str | None = None
    dtypes: tuple[str, ...] = ()
    memory_rate: float | None = None
    arithmetic: Mapping[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`cpu`, `cuda` or `mps`."""
        return self.device_id.partition(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheDisk:
    """A writable directory for KV files. Sizes in bytes, rates in bytes per second as probed."""

    path: str
    total_bytes: int
    write_rate: float | None = None
    read_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one worker advertises: everything that changes seldom. What it has free now is `LiveState`.

    `passes` maps every pass to None when the worker can apply it, else to the reason why it cannot; the same for `backends`,
    `kv_strategies`, `kinds` (see `Requirements.kind`) and `quantizations`, ways to pack weights that take a library,
    and `modalities`, what rows may bring besides text.
    `no_adapters_because` is None where it can put an adapter on a model.
    `may_download`: it may fetch models from the hub; where `downloadable` has patterns such as `org/*`, only repositories that
    fit one of them. The defaults are for workers that say nothing of these. `labels` are the operator's; numbers compare as
    numbers.
    """

    node: str
    slots: int
    devices: tuple[Device, ...]
    host_memory_bytes: int
    backends: Mapping[str, str | None]
    passes: Mapping[PassId, str | None]
    kv_strategies: Mapping[str, str | None]
    kinds: Mapping[str, str | None] = field(default_factory=lambda: {GenericModelKind.CAUSAL_LM.value: None})
    quantizations: Mapping[str, str | None] = field(default_factory=dict)
    modalities: Mapping[ModelModality, str | None] = field(default_factory=dict)
    no_adapters_because: str | None = "not known to this worker"
    models: tuple[ModelProfile, ...] = ()
    cache_disk: CacheDisk | None = None
    may_download: bool = False
    downloadable: tuple[str, ...] = ()
    labels: Mapping[str, str | float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.slots < 1 or not self.devices:
            raise ValueError("a worker has at least one slot and one device")

    @property
    def main_device(self) -> Device:
        """The device that plans run on unless pinned: the accelerator with the most memory, else the CPU."""
        return max(self.devices, key=lambda device: (device.kind != "cpu", device.memory_bytes))

    def may_fetch(self, repo_id: str) -> bool:
        """Whether its operator lets it download this repository."""
        is_listed = not self.downloadable or any(fnmatchcase(repo_id, pattern) for pattern in self.downloadable)
        return self.may_download and is_listed

    def model(self, digest: str) -> ModelProfile | None:
        """The usable model with this digest, if the worker has it."""
        for model in self.models:
            if model.digest == digest and model.is_usable:
                return model
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState:
    """What a worker has free at this moment, in bytes; its own warm runner counts as free.

    `laid_out` are the digests of the models whose weights lie whole on the cache disk, by layers. `begun_bytes` is what is there
    of others by digest: who lays them out goes on from there, or deletes it first. The defaults are for workers that do not say.
    """

    device_free_bytes: Mapping[str, int]
    host_free_bytes: int
    cache_free_bytes: int = 0
    warm_model: str | None = None
    laid_out: frozenset[str] = frozenset()
    begun_bytes: Mapping[str, int] = field(default_factory=dict)
