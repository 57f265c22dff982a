"""What can this worker do, and what has it free at this moment? Hardware, disk, libraries and models; torch is never imported."""

import logging
import platform
import re
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ollm_service.core.capabilities import CacheDisk, Capabilities, Device, LiveState
from ollm_service.core.labels import Attributes
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.passes import PASS_TRAITS, PassTraits
from ollm_service.core.plan import BackendId, GenericModelKind, ModelModality, NativeFamily
from ollm_service.core.profile import ModelProfile
from ollm_service.core.quantization import QUANTIZATION_LIBRARIES
from workers.cache_folder import DiskRates, NoCacheFolder, check_writable, free_bytes, measure, total_bytes, weights_folder
from workers.host_memory import host_memory, private_bytes
from workers.laid_out import LaidOutWeights
from workers.nvml import Gpu, Nvml, NvmlUnavailable, visible

CPU_DTYPES = ("float64", "float32", "bfloat16", "float16")
RUNNER_LIBRARIES = ("torch", "transformers", "safetensors")
ADAPTER_LIBRARY = "peft"
# WAV files need none beyond what the runner has anyway.
MEDIA_LIBRARIES: Mapping[ModelModality, tuple[str, ...]] = {ModelModality.IMAGE: ("pillow",)}
# What a model may be of: the generic kinds, and a family whose models are of none.
KINDS = (*(kind.value for kind in GenericModelKind), NativeFamily.VOXTRAL.value)
GPU_SECONDS = 1.0  # how long an answer of the driver is good for
_PACKAGE = "ollm-service"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What the operator says of this worker, and how its runner is started.

    `memory_limit_bytes` is what all runners together may take of host memory. `has_own_runner` is true where runners of our own
    kind are started, which need torch and transformers here. `may_download`: models may be fetched from the hub, of repositories
    that fit a pattern in `downloadable` where there are any.
    """

    node: str
    slots: int
    labels: Attributes = field(default_factory=dict)
    memory_limit_bytes: int | None = None
    has_own_runner: bool = True
    may_download: bool = False
    downloadable: tuple[str, ...] = ()


class Probe:
    """Looks at this machine. `environment` is the runners': it decides which GPUs they will see."""

    def __init__(self, claims: Claims, environment: Mapping[str, str]) -> None:
        self._claims = claims
        self._environment = environment
        self._lacking = _lacking_library() if claims.has_own_runner else None
        self._versions = _versions()
        self._nvml = self._open_nvml()
        self._gpus: tuple[float, tuple[Gpu, ...]] | None = None
        self._rates: dict[Path, DiskRates | None] = {}
        self._weights = LaidOutWeights(self._versions.get("transformers"))

    def capabilities(
        self, models: tuple[ModelProfile, ...], cache_folders: Collection[Path], no_cache_because: str | None
    ) -> Capabilities:
        """Everything that changes seldom. Where a cache folder is missing or cannot be written to now, there is no disk cache."""
        reason = no_cache_because or _why_unwritable(cache_folders)
        backend_reason = None if self._lacking is None else f"{self._lacking} is not installed on this worker"
        devices = self._devices()
        has_accelerator = any(device.kind != "cpu" for device in devices)
        return Capabilities(
            node=self._claims.node,
            slots=self._claims.slots,
            devices=devices,
            host_memory_bytes=self._host_memory_bytes(),
            backends={backend.value: backend_reason for backend in BackendId},
            passes={pass_id: _pass_reason(traits, reason, has_accelerator) for pass_id, traits in PASS_TRAITS.items()},
            kv_strategies={strategy.value: _strategy_reason(strategy, reason) for strategy in KVCacheStrategy},
            kinds=dict.fromkeys(KINDS),
            quantizations={method: self._absent(*libraries) for method, libraries in QUANTIZATION_LIBRARIES.items()},
            modalities={modality: self._absent(*MEDIA_LIBRARIES.get(modality, ())) for modality in ModelModality},
            no_adapters_because=self._absent(ADAPTER_LIBRARY),
            models=models,
            cache_disk=None if reason else self._cache_disk(next(iter(cache_folders))),
            may_download=self._claims.may_download,
            downloadable=self._claims.downloadable,
            labels=self._claims.labels,
            versions=self._versions,
        )

    def live(
        self,
        runners: Mapping[int, tuple[str, int] | None],
        cache_folder: Path | None,
        warm_model: str | None,
        others: Collection[int] = (),
    ) -> LiveState:
        """What is free now. What these runners hold counts as free: they are idle, or the asker's own.

        Each process id comes with the device and the bytes last promised to it, which stand in where a GPU's driver does not
        tell who holds what, as in containers. `others` are the worker's other runners, whose memory counts against its limit.
        """
        memory, limit = host_memory(), self._claims.memory_limit_bytes
        own = sum(private_bytes(pid) for pid in runners)
        host_free = min(memory.total, memory.free + own)
        if limit is not None:
            host_free = min(host_free, max(0, limit - sum(private_bytes(pid) for pid in others)))
        free = {"cpu": host_free}
        for number, gpu in enumerate(self._visible_gpus()):
            held = sum(_held(gpu, f"cuda:{number}", pid, promise) for pid, promise in runners.items())
            free[f"cuda:{number}"] = min(gpu.total_bytes, gpu.free_bytes + held)
        weights = self._weights.look(weights_folder(cache_folder) if cache_folder else None)
        return LiveState(
            device_free_bytes=free,
            host_free_bytes=host_free,
            cache_free_bytes=free_bytes(cache_folder) if cache_folder else 0,
            warm_model=warm_model,
            laid_out=weights.whole,
            begun_bytes=weights.begun_bytes,
        )

    def held_by(self, pid: int | None, device_id: str) -> int:
        """The bytes of a device's memory that a runner holds; 0 where the driver does not tell."""
        if pid is None:
            return 0
        if device_id == "cpu":
            return private_bytes(pid)
        gpus = {f"cuda:{number}": gpu for number, gpu in enumerate(self._visible_gpus())}
        return gpus[device_id].used_by.get(pid, 0) if device_id in gpus else 0

    def _absent(self, *packages: str) -> str | None:
        """Why runners here cannot do what takes these packages, which not every worker has; None where they can."""
        lacking = [name for name in packages if self._claims.has_own_runner and not _is_installed(name)]
        return f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed on this worker" if lacking else None

    def _devices(self) -> tuple[Device, ...]:
        gpus = tuple(
            Device(
                device_id=f"cuda:{number}",
                name=gpu.name,
                memory_bytes=gpu.total_bytes,
                compute_capability=".".join(map(str, gpu.compute_capability)),
                dtypes=_cuda_dtypes(gpu.compute_capability),
            )
            for number, gpu in enumerate(self._visible_gpus())
        )
        return (*gpus, _cpu(self._host_memory_bytes()))

    def _host_memory_bytes(self) -> int:
        """The machine's memory, or as much of it as the operator lets runners have."""
        return min(host_memory().total, self._claims.memory_limit_bytes or sys.maxsize)

    def _cache_disk(self, folder: Path) -> CacheDisk:
        if folder not in self._rates:
            self._rates[folder] = measure(folder)
        rates = self._rates[folder]
        return CacheDisk(
            path=str(folder.parent),
            total_bytes=total_bytes(folder),
            write_rate=rates.write if rates else None,
            read_rate=rates.read if rates else None,
        )

    def _open_nvml(self) -> Nvml | None:
        if self._claims.has_own_runner and not _torch_has_cuda():
            return None
        try:
            return Nvml()
        except NvmlUnavailable as error:
            _log.debug("no-gpu", extra={"reason": str(error)})
            return None

    def _visible_gpus(self) -> tuple[Gpu, ...]:
        if self._nvml is None:
            return ()
        if self._gpus is not None and time.monotonic() - self._gpus[0] < GPU_SECONDS:
            return self._gpus[1]
        try:
            gpus = visible(self._nvml.gpus(), self._environment)
        except NvmlUnavailable as error:
            _log.warning("gpu-lost", extra={"reason": str(error)})
            gpus = ()
        self._gpus = (time.monotonic(), gpus)
        return gpus


def _held(gpu: Gpu, device_id: str, pid: int, promise: tuple[str, int] | None) -> int:
    """The bytes of this GPU that a runner holds, by the driver, else by what it was promised."""
    if pid in gpu.used_by:
        return gpu.used_by[pid]
    if promise is None or promise[0] != device_id:
        return 0
    return min(promise[1], gpu.total_bytes - gpu.free_bytes)


def _cpu(memory_bytes: int) -> Device:
    return Device(device_id="cpu", name=platform.processor() or platform.machine(), memory_bytes=memory_bytes, dtypes=CPU_DTYPES)


def _cuda_dtypes(compute_capability: tuple[int, int]) -> tuple[str, ...]:
    """bfloat16 is native from Ampere on; before it is emulated so slowly that it counts as missing."""
    return ("float64", "float32", "float16", "bfloat16") if compute_capability >= (8, 0) else ("float64", "float32", "float16")


def _pass_reason(traits: PassTraits, no_cache_because: str | None, has_accelerator: bool) -> str | None:
    if traits.needs_accelerator and not has_accelerator:
        return "no accelerator"
    return no_cache_because if traits.needs_cache_disk else None


def _strategy_reason(strategy: KVCacheStrategy, no_cache_because: str | None) -> str | None:
    return None if strategy is KVCacheStrategy.RESIDENT else no_cache_because


def _why_unwritable(folders: Collection[Path]) -> str | None:
    try:
        for folder in folders:
            check_writable(folder)
    except NoCacheFolder as error:
        return f"no writable cache directory: {error}"
    return None if folders else "no writable cache directory"


def _lacking_library() -> str | None:
    return next((name for name in RUNNER_LIBRARIES if find_spec(name) is None), None)


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (_PACKAGE, *RUNNER_LIBRARIES[:2]):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _torch_has_cuda() -> bool:
    """Whether the torch that runners will import was built with CUDA: it says so in a file, so it need not be loaded."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None
