"""Which machines can a quote assume by name? Memory and speed as their makers publish them, for `what if I had one`.

Memory rates in bytes per second and dense arithmetic in operations per second, from the makers' data sheets; what a model reaches
of them is another matter, which the efficiencies in `rates` stand for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ollm_service.core.capabilities import CacheDisk, Capabilities, Device, LiveState
from ollm_service.core.errors import InvalidOption
from ollm_service.core.labels import Attributes
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.plan import BackendId, ModelModality, PassId
from ollm_service.core.profile import ModelProfile
from ollm_service.core.quantization import QUANTIZATION_LIBRARIES
from ollm_service.core.wire import from_json, to_json

GIB, GB, TERA = 1024**3, 1e9, 1e12
DISK = CacheDisk(path="a cache disk", total_bytes=1000 * 10**9, write_rate=1.0 * GB, read_rate=2.0 * GB)
USUAL_HOST_BYTES = 32 * GIB
FREE_SHARE = 0.95  # of a device's memory, on a machine that does nothing else


def _cuda(name: str, memory_gib: int, rate_gb: float, half: float, single: float, capability: str) -> Device:
    arithmetic = {"bfloat16": half * TERA, "float16": half * TERA, "float32": single * TERA}
    return Device(
        device_id="cuda:0",
        name=name,
        memory_bytes=memory_gib * GIB,
        compute_capability=capability,
        dtypes=("float64", "float32", "float16", "bfloat16"),
        memory_rate=rate_gb * GB,
        arithmetic=arithmetic,
    )


KNOWN_DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "h200": _cuda("NVIDIA H200", 141, 4800, 989, 67, "9.0"),
        "h100": _cuda("NVIDIA H100 80GB HBM3", 80, 3350, 989, 67, "9.0"),
        "a100": _cuda("NVIDIA A100-SXM4-80GB", 80, 2039, 312, 19.5, "8.0"),
        "l4": _cuda("NVIDIA L4", 24, 300, 121, 30.3, "8.9"),
        "rtx-4090": _cuda("NVIDIA GeForce RTX 4090", 24, 1008, 165, 82.6, "8.9"),
        "rtx-3090": _cuda("NVIDIA GeForce RTX 3090", 24, 936, 71, 35.6, "8.6"),
        "rtx-4060": _cuda("NVIDIA GeForce RTX 4060", 8, 272, 60, 15.1, "8.9"),
    }
)


def hypothetical(wanted: str | Mapping[str, Any], models: Sequence[ModelProfile]) -> tuple[str, Capabilities, LiveState]:
    """A machine that has these models and can do all that is known: its name, what it offers and what it has free.

    `wanted` is a name of KNOWN_DEVICES, or an object with the fields of Device and perhaps `host_memory_bytes`, `slots` and
    `labels`. Raises InvalidOption.
    """
    if isinstance(wanted, str):
        if wanted not in KNOWN_DEVICES:
            raise InvalidOption("if", f"`{wanted}` is not a known device", allowed=KNOWN_DEVICES)
        device, host, slots = KNOWN_DEVICES[wanted], USUAL_HOST_BYTES, 1
    else:
        device, host, slots = _described(wanted)
    labels = {} if isinstance(wanted, str) else _labels(wanted)
    if device.kind == "cpu":
        host = device.memory_bytes
    offered = Capabilities(
        node=device.name,
        slots=slots,
        devices=(device,),
        host_memory_bytes=host,
        backends={backend.value: None for backend in BackendId},
        passes=dict.fromkeys(PassId),
        kv_strategies=dict.fromkeys(KVCacheStrategy),
        quantizations=dict.fromkeys(QUANTIZATION_LIBRARIES),
        modalities=dict.fromkeys(ModelModality),
        models=tuple(models),
        cache_disk=DISK,
        labels=labels,
    )
    free = {device.device_id: int(device.memory_bytes * FREE_SHARE)}
    live = LiveState(device_free_bytes=free, host_free_bytes=int(host * FREE_SHARE), cache_free_bytes=DISK.total_bytes)
    return f"if {wanted if isinstance(wanted, str) else device.name}", offered, live


def as_offered_by(capabilities: Capabilities, example: Capabilities) -> Capabilities:
    """The same machine with the software of a real worker: what that cannot do, it cannot either."""
    return replace(
        capabilities,
        backends=example.backends,
        passes=example.passes,
        kv_strategies=example.kv_strategies,
        kinds=example.kinds,
        quantizations=example.quantizations,
        modalities=example.modalities,
        no_adapters_because=example.no_adapters_because,
    )


def _described(wanted: Mapping[str, Any]) -> tuple[Device, int, int]:
    allowed = (*to_json(KNOWN_DEVICES["h200"]), "host_memory_bytes", "slots", "labels")
    for name in wanted:
        if name not in allowed:
            raise InvalidOption("if", f"`{name}` is not a field of a device", allowed=allowed)
    if "memory_bytes" not in wanted:
        raise InvalidOption("if", "a device needs memory_bytes")
    try:
        host, slots = int(wanted.get("host_memory_bytes", USUAL_HOST_BYTES)), int(wanted.get("slots", 1))
        device = from_json(Device, {"device_id": "cuda:0", "name": "a device", **wanted})
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidOption("if", f"the device is described wrongly: {error}") from error
    if device.memory_bytes < 1 or host < 1 or slots < 1:
        raise InvalidOption("if", "a device needs memory_bytes, host_memory_bytes and slots above 0")
    return device, host, slots


def _labels(wanted: Mapping[str, Any]) -> Attributes:
    labels = wanted.get("labels", {})
    if not isinstance(labels, Mapping) or not all(type(value) in (str, int, float) for value in labels.values()):
        raise InvalidOption("if", 'labels are an object of texts and numbers, such as {"zone": "home", "rack": 2}')
    return {name: float(value) if isinstance(value, int) else value for name, value in labels.items()}
