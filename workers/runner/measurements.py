"""What did an attempt cost? Seconds, bytes and tokens, as they are recorded beside the estimate."""

import time
from collections.abc import Sequence

import torch

from ollm_service.core.leasing import RowResult
from workers.runner.memory import peak_host_bytes, reset_peak_host_bytes


class Measurements:
    """Counts of one attempt. Peaks are those since generation started, the model's own weights included.

    `bare_host_bytes` is what the process took before it had a model; on the CPU the device's peak is what came on top of it, so
    that it can be held against an estimate.
    """

    def __init__(self, bare_host_bytes: int = 0) -> None:
        self._bare_host_bytes = bare_host_bytes
        self.load_seconds = 0.0
        self.halvings = 0
        self._device = torch.device("cpu")
        self._started = time.monotonic()
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._prefill_tokens = self._decode_tokens = self._decode_passes = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._micro_batches = 0
        self._largest_micro_batch = 0

    def start_generating(self, device: torch.device) -> None:
        """Rates count from here."""
        self._device = device
        self._started = time.monotonic()
        reset_peak_host_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def count(self, results: Sequence[RowResult]) -> None:
        """Count a finished micro-batch."""
        self._micro_batches += 1
        self._largest_micro_batch = max(self._largest_micro_batch, len(results))
        self._prompt_tokens += sum(result.prompt_tokens for result in results)
        self._completion_tokens += sum(result.completion_tokens for result in results)

    def count_pass(self, shape: Sequence[int], seconds: float) -> None:
        """Count a forward pass over `shape` = (rows, new positions): prompts, or one token of each row."""
        rows, positions = shape
        if positions > 1:
            self._prefill_tokens += rows * positions
            self._prefill_seconds += seconds
        else:
            self._decode_tokens += rows
            self._decode_seconds += seconds
            self._decode_passes += 1

    def as_dict(self) -> dict[str, float]:
        """Everything so far. `tokens_per_second` is generated tokens per second since generation started.

        `prefill_tokens` are positions with their padding, `decode_tokens` those of rows that were still running.
        """
        seconds = max(time.monotonic() - self._started, 1e-9)
        peak = peak_host_bytes()
        measured = {
            "load_seconds": self.load_seconds,
            "generate_seconds": seconds,
            "prompt_tokens": float(self._prompt_tokens),
            "completion_tokens": float(self._completion_tokens),
            "tokens_per_second": self._completion_tokens / seconds,
            "prefill_tokens": float(self._prefill_tokens),
            "prefill_seconds": self._prefill_seconds,
            "decode_tokens": float(self._decode_tokens),
            "decode_seconds": self._decode_seconds,
            "decode_passes": float(self._decode_passes),
            "micro_batches": float(self._micro_batches),
            "largest_micro_batch": float(self._largest_micro_batch),
            "memory_halvings": float(self.halvings),
            "peak_host_bytes": float(peak),
        }
        if self._device.type == "cuda":
            measured["peak_device_bytes"] = float(torch.cuda.max_memory_allocated(self._device))
        elif self._device.type == "cpu":
            measured["peak_device_bytes"] = float(max(0, peak - self._bare_host_bytes))
        return measured
