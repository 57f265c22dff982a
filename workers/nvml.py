"""Which NVIDIA GPUs may this process use, and what have they free? Asked of the driver's own library, without torch."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
MOST_PROCESSES = 512
_TEXT_BYTES = 128


class NvmlUnavailable(Exception):
    """The driver's library is not there or refuses to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, memory in bytes. `used_by` maps the process ids that the driver tells to the bytes that they hold."""

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    used_by: Mapping[int, int] = field(default_factory=dict)


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """A session with the driver's library. Raises NvmlUnavailable where there is none."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library: Any = ctypes.CDLL(library)
        except OSError as error:
            raise NvmlUnavailable(str(error)) from error
        self._call("nvmlInit_v2")

    def gpus(self) -> tuple[Gpu, ...]:
        """Every GPU of the machine, in the order of their bus ids. Raises NvmlUnavailable."""
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return tuple(self._gpu(index) for index in range(count.value))

    def _gpu(self, index: int) -> Gpu:
        device, memory = ctypes.c_void_p(), _Memory()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        self._call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        self._call("nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor))
        return Gpu(
            uuid=self._text("nvmlDeviceGetUUID", device),
            name=self._text("nvmlDeviceGetName", device),
            total_bytes=memory.total,
            free_bytes=memory.free,
            compute_capability=(major.value, minor.value),
            used_by=self._processes(device),
        )

    def _processes(self, device: ctypes.c_void_p) -> dict[int, int]:
        """Who uses the GPU; empty where the driver does not tell, as in some containers."""
        count, found = ctypes.c_uint(MOST_PROCESSES), (_Process * MOST_PROCESSES)()
        try:
            self._call("nvmlDeviceGetComputeRunningProcesses_v3", device, ctypes.byref(count), found)
        except NvmlUnavailable:
            return {}
        unknown = ctypes.c_ulonglong(-1).value
        return {process.pid: process.used for process in found[: count.value] if process.used != unknown}

    def _text(self, name: str, device: ctypes.c_void_p) -> str:
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call(name, device, buffer, ctypes.c_uint(_TEXT_BYTES))
        return buffer.value.decode(errors="replace")

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            code = getattr(self._library, name)(*arguments)
        except AttributeError as error:
            raise NvmlUnavailable(f"{name} is not in this driver") from error
        if code:
            raise NvmlUnavailable(f"{name} answered {code}")


def visible(gpus: tuple[Gpu, ...], environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Those that `CUDA_VISIBLE_DEVICES` leaves, in its order: torch's numbering where CUDA_DEVICE_ORDER is PCI_BUS_ID."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isdecimal() and int(entry) < len(gpus):
            chosen.append(gpus[int(entry)])
            continue
        named = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        if len(named) != 1:
            break  # CUDA, too, ignores everything from the first entry that it does not know
        chosen.append(named[0])
    return tuple(chosen)
