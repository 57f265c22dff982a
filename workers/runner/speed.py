"""How fast are this machine's devices, as torch uses them? Measured in a fraction of a second, for the quotes of jobs."""

import time
from collections.abc import Callable

import torch

from ollm_service.core.wire import DeviceSpeed, Speed

SECONDS = 0.01  # of trying, for each size
TOO_LONG_SECONDS = 0.04  # larger sizes are left out
READ_BYTES = (16 * 1024**2, 64 * 1024**2, 256 * 1024**2, 1024**3)
ROWS, WIDTHS = 64, (256, 512, 1024, 2048, 4096, 8192)  # a micro-batch's tokens through layers of growing width
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure_speed() -> Speed:
    """The CPU and every CUDA device."""
    devices = [torch.device("cpu"), *(torch.device("cuda", number) for number in range(torch.cuda.device_count()))]
    return Speed(devices={str(device): _speed_of(device) for device in devices})


@torch.inference_mode()
def _speed_of(device: torch.device) -> DeviceSpeed:
    return DeviceSpeed(
        memory_rate=_read_rate(device),
        arithmetic={str(dtype).removeprefix("torch."): _product_rate(device, dtype) for dtype in _DTYPES},
    )


def _read_rate(device: torch.device) -> float:
    """Bytes per second, of the size that shows most."""
    best = 0.0
    for size in READ_BYTES:
        if best and size / best > TOO_LONG_SECONDS / 10:
            break
        numbers = torch.ones(size // 4, device=device)  # written, since pages of zeros are all the same page
        best = max(best, size / _shortest(numbers.sum, device))
    return best


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second, of the size that shows most: small ones keep no device busy."""
    best = 0.0
    for width in WIDTHS:
        operations = 2 * ROWS * width * width
        if best and operations / best > TOO_LONG_SECONDS:
            break
        tokens = torch.ones(ROWS, width, device=device, dtype=dtype)
        weights = torch.ones(width, width, device=device, dtype=dtype)
        best = max(best, operations / _shortest(lambda: tokens @ weights, device))  # noqa: B023 - called at once
    return best


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs: whatever slows one down is not the device."""
    work()  # the first run of a shape sets things up
    shortest, until = float("inf"), time.perf_counter() + SECONDS
    while True:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        shortest = min(shortest, ended - began)
        if ended > until:
            return max(shortest, 1e-9)
