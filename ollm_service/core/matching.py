"""Which workers can honour what a plan requires, and why can the others not?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ollm_service.core.capabilities import Capabilities, Device
from ollm_service.core.labels import names_in, satisfies
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.plan import ModelModality, PassId
from ollm_service.core.requirements import Requirements

GIB = 1024**3
UNKNOWN = "not known to this worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The worker offers everything that is required."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoMatch:
    """The worker falls short; each reason names one requirement and what the worker has instead."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetMatch:
    """Which workers of a fleet are eligible, by worker id, and the reasons of every other worker."""

    eligible: tuple[str, ...]
    refused: Mapping[str, NoMatch]


_MATCH = Match()
# Looked up once, not for each worker.
_RESIDENT, _CPU_OFFLOAD, _TEXT = KVCacheStrategy.RESIDENT, PassId.CPU_OFFLOAD, ModelModality.TEXT


def match(requirements: Requirements, capabilities: Capabilities) -> Match | NoMatch:
    """Whether one worker can honour the requirements. Adding a requirement never turns NoMatch into Match."""
    reasons = _shortfalls(requirements, capabilities)
    return NoMatch(reasons=tuple(reasons)) if reasons else _MATCH


def match_fleet(requirements: Requirements, fleet: Mapping[str, Capabilities]) -> FleetMatch:
    """Match against every worker; each worker id stands in exactly one of the two results."""
    verdicts = {worker_id: match(requirements, capabilities) for worker_id, capabilities in fleet.items()}
    return FleetMatch(
        eligible=tuple(worker_id for worker_id, verdict in verdicts.items() if isinstance(verdict, Match)),
        refused={worker_id: verdict for worker_id, verdict in verdicts.items() if isinstance(verdict, NoMatch)},
    )


def attributes(capabilities: Capabilities) -> dict[str, str | float]:
    """What a label expression may name: the operator's labels and `node`, `device`, `gpu_memory_gb`, `host_memory_gb`."""
    return {**capabilities.labels, **{name: tell(capabilities) for name, tell in _OWN_ATTRIBUTES.items()}}


def _gpu_memory_gb(capabilities: Capabilities) -> float:
    return sum([device.memory_bytes for device in capabilities.devices if device.kind != "cpu"]) / GIB


_OWN_ATTRIBUTES: Mapping[str, Callable[[Capabilities], str | float]] = {
    "node": lambda capabilities: capabilities.node,
    "device": lambda capabilities: capabilities.main_device.kind,
    "gpu_memory_gb": _gpu_memory_gb,
    "host_memory_gb": lambda capabilities: capabilities.host_memory_bytes / GIB,
}


def _holds(where: str, capabilities: Capabilities) -> bool:
    """Whether a label expression holds for a worker; only the attributes that it names are worked out."""
    named = dict(capabilities.labels)
    for name in names_in(where):
        tell = _OWN_ATTRIBUTES.get(name)
        if tell is not None:
            named[name] = tell(capabilities)
    return satisfies(where, named)


def devices_for(requirements: Requirements, capabilities: Capabilities) -> tuple[Device, ...]:
    """The devices that a plan may use, accelerators first: all of them, or those with the pinned id or of the pinned kind."""
    return tuple(sorted(_allowed(requirements, capabilities), key=lambda device: (device.kind == "cpu", -device.memory_bytes)))


def able_devices(requirements: Requirements, capabilities: Capabilities) -> tuple[Device, ...]:
    """Those of them that compute in the plan's dtype; a device that names no dtypes computes in any."""
    return tuple(_computing(requirements, devices_for(requirements, capabilities)))


def _allowed(requirements: Requirements, capabilities: Capabilities) -> Sequence[Device]:
    wanted = requirements.device
    if wanted is None:
        return capabilities.devices
    return [device for device in capabilities.devices if wanted in (device.device_id, device.kind)]


def _computing(requirements: Requirements, devices: Sequence[Device]) -> Sequence[Device]:
    dtype = requirements.dtype
    return devices if dtype is None else [device for device in devices if not device.dtypes or dtype in device.dtypes]


def _shortfalls(requirements: Requirements, capabilities: Capabilities) -> list[str]:
    """Every requirement that is not met, in words. A list: this runs for each worker of a fleet."""
    found: list[str] = []
    lacking = capabilities.backends.get(requirements.backend_id, UNKNOWN)
    if lacking is not None:
        found.append(f"backend {requirements.backend_id}: {lacking}")
    for pass_id in requirements.passes:
        lacking = capabilities.passes.get(pass_id, UNKNOWN)
        if lacking is not None:
            found.append(f"pass {pass_id}: {lacking}")
    if requirements.kind is not None:
        lacking = capabilities.kinds.get(requirements.kind, UNKNOWN)
        if lacking is not None:
            found.append(f"models of kind {requirements.kind}: {lacking}")
    if requirements.adapter and capabilities.no_adapters_because is not None:
        found.append(f"adapters: {capabilities.no_adapters_because}")
    strategy = requirements.kv_cache_strategy
    if strategy is not None and strategy != _RESIDENT:
        lacking = capabilities.kv_strategies.get(strategy, UNKNOWN)
        if lacking is not None:
            found.append(f"KV cache strategy {strategy}: {lacking}")
    for told in (_input_shortfall, _packing_shortfall, _model_shortfall, _device_shortfall, _disk_shortfall):
        lacking = told(requirements, capabilities)
        if lacking is not None:
            found.append(lacking)
    if requirements.where is not None and not _holds(requirements.where, capabilities):
        found.append(f"labels: `{requirements.where}` does not hold here")
    return found


def _input_shortfall(requirements: Requirements, capabilities: Capabilities) -> str | None:
    for modality in requirements.modalities:
        lacking = None if modality == _TEXT else capabilities.modalities.get(modality, UNKNOWN)
        if lacking is not None:
            return f"{modality} input: {lacking}"
    return None


def _packing_shortfall(requirements: Requirements, capabilities: Capabilities) -> str | None:
    method = requirements.quantization
    lacking = None if method is None else capabilities.quantizations.get(method, UNKNOWN)
    return None if lacking is None else f"weights quantized by {method}: {lacking}"


def _model_shortfall(requirements: Requirements, capabilities: Capabilities) -> str | None:
    digest, download = requirements.model_digest, requirements.download
    if digest is not None:
        return None if capabilities.model(digest) else f"model {digest[:12]}: not in this worker's models folder"
    if download is None or capabilities.may_fetch(download.partition("@")[0]):
        return None
    only = f" anything but {', '.join(capabilities.downloadable)}" if capabilities.may_download else ""
    return f"model {download}: not here, and this worker may not download{only}"


def _device_shortfall(requirements: Requirements, capabilities: Capabilities) -> str | None:
    devices = _allowed(requirements, capabilities)
    if not devices:
        return f"device {requirements.device}: this worker has {', '.join(d.device_id for d in capabilities.devices)}"
    able = _computing(requirements, devices)
    if not able:
        ordered = devices_for(requirements, capabilities)
        return f"dtype {requirements.dtype}: not computed by {', '.join(device.device_id for device in ordered)}"
    offloads = capabilities.passes.get(_CPU_OFFLOAD, UNKNOWN) is None
    needed = requirements.offloaded_bytes if offloads else requirements.memory_bytes
    if needed <= max([device.memory_bytes for device in able]):
        return None
    largest = max(able, key=lambda device: device.memory_bytes)
    return f"memory: {needed:,} bytes needed, {largest.device_id} has {largest.memory_bytes:,}"


def _disk_shortfall(requirements: Requirements, capabilities: Capabilities) -> str | None:
    disk = capabilities.cache_disk.total_bytes if capabilities.cache_disk else 0
    return f"cache disk: {requirements.cache_bytes:,} bytes needed, {disk:,} there" if disk < requirements.cache_bytes else None
