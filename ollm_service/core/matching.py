"""Which workers can honour what a plan requires, and why can the others not?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ollm_service.core.capabilities import Capabilities, Device
from ollm_service.core.labels import satisfies
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.plan import PassId
from ollm_service.core.requirements import Requirements

GIB = 1024**3


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


def match(requirements: Requirements, capabilities: Capabilities) -> Match | NoMatch:
    """Whether one worker can honour the requirements. Adding a requirement never turns NoMatch into Match."""
    reasons = tuple(_shortfalls(requirements, capabilities))
    return NoMatch(reasons=reasons) if reasons else _MATCH


def match_fleet(requirements: Requirements, fleet: Mapping[str, Capabilities]) -> FleetMatch:
    """Match against every worker; each worker id stands in exactly one of the two results."""
    verdicts = {worker_id: match(requirements, capabilities) for worker_id, capabilities in fleet.items()}
    return FleetMatch(
        eligible=tuple(worker_id for worker_id, verdict in verdicts.items() if isinstance(verdict, Match)),
        refused={worker_id: verdict for worker_id, verdict in verdicts.items() if isinstance(verdict, NoMatch)},
    )


def attributes(capabilities: Capabilities) -> dict[str, str | float]:
    """What a label expression may name: the operator's labels and `node`, `device`, `gpu_memory_gb`, `host_memory_gb`."""
    main = capabilities.main_device
    gpu_bytes = sum([device.memory_bytes for device in capabilities.devices if device.kind != "cpu"])
    return {
        **capabilities.labels,
        "node": capabilities.node,
        "device": main.kind,
        "gpu_memory_gb": gpu_bytes / GIB,
        "host_memory_gb": capabilities.host_memory_bytes / GIB,
    }


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
    return [device for device in devices if dtype is None or not device.dtypes or dtype in device.dtypes]


def _shortfalls(requirements: Requirements, capabilities: Capabilities) -> Iterator[str]:
    lacking = capabilities.backends.get(requirements.backend_id, "not known to this worker")
    if lacking is not None:
        yield f"backend {requirements.backend_id}: {lacking}"
    for pass_id in requirements.passes:
        lacking = capabilities.passes.get(pass_id, "not known to this worker")
        if lacking is not None:
            yield f"pass {pass_id}: {lacking}"
    if requirements.kind is not None:
        lacking = capabilities.kinds.get(requirements.kind, "not known to this worker")
        if lacking is not None:
            yield f"models of kind {requirements.kind}: {lacking}"
    if requirements.adapter and capabilities.no_adapters_because is not None:
        yield f"adapters: {capabilities.no_adapters_because}"
    strategy = requirements.kv_cache_strategy
    if strategy not in (None, KVCacheStrategy.RESIDENT):
        lacking = capabilities.kv_strategies.get(str(strategy), "not known to this worker")
        if lacking is not None:
            yield f"KV cache strategy {strategy}: {lacking}"
    yield from _model_shortfalls(requirements, capabilities)
    yield from _size_shortfalls(requirements, capabilities)
    if requirements.where is not None and not satisfies(requirements.where, attributes(capabilities)):
        yield f"labels: `{requirements.where}` does not hold here"


def _model_shortfalls(requirements: Requirements, capabilities: Capabilities) -> Iterator[str]:
    if requirements.model_digest is not None:
        if capabilities.model(requirements.model_digest) is None:
            yield f"model {requirements.model_digest[:12]}: not in this worker's models folder"
    elif requirements.download is not None and not capabilities.may_fetch(requirements.download.partition("@")[0]):
        allowed = ", ".join(capabilities.downloadable)
        only = f" anything but {allowed}" if capabilities.may_download else ""
        yield f"model {requirements.download}: not here, and this worker may not download{only}"


def _size_shortfalls(requirements: Requirements, capabilities: Capabilities) -> Iterator[str]:
    devices = _allowed(requirements, capabilities)
    if not devices:
        yield f"device {requirements.device}: this worker has {', '.join(d.device_id for d in capabilities.devices)}"
        return
    able = _computing(requirements, devices)
    if not able:
        ordered = devices_for(requirements, capabilities)
        yield f"dtype {requirements.dtype}: not computed by {', '.join(device.device_id for device in ordered)}"
    else:
        offloads = capabilities.passes.get(PassId.CPU_OFFLOAD, "not known to this worker") is None
        needed = requirements.offloaded_bytes if offloads else requirements.memory_bytes
        largest = max(able, key=lambda device: device.memory_bytes)
        if largest.memory_bytes < needed:
            yield f"memory: {needed:,} bytes needed, {largest.device_id} has {largest.memory_bytes:,}"
    disk = capabilities.cache_disk.total_bytes if capabilities.cache_disk else 0
    if disk < requirements.cache_bytes:
        yield f"cache disk: {requirements.cache_bytes:,} bytes needed, {disk:,} there"
