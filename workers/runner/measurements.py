"""What did an attempt cost? Seconds, bytes and tokens, as they are recorded beside the estimate."""

import time
from collections.abc import Sequence

import torch

from ollm_service.core.leasing import RowResult
from workers.runner.memory import disk_bytes, peak_host_bytes, reset_peak_host_bytes


class Measurements:
    """Counts of one attempt. Peaks are those since generation started, the model's own weights included; what was read from disks
    and written to them counts from the beginning, with the checkpoint and the extents that were made of it.

    `bare_host_bytes` is what the process took before it had a model; on the CPU the device's peak is what came on top of it, so
    that it can be held against an estimate. `peak_load_bytes` is the most host memory while the model was loaded, above the same,
    and without the pages of mapped files; 0 of a warm model.
    """

    def __init__(self, bare_host_bytes: int = 0) -> None:
        self._bare_host_bytes = bare_host_bytes
        self._moved_before = disk_bytes()
        self.load_seconds = 0.0
        self.peak_load_bytes = 0
        self.halvings = 0
        self._device = torch.device("cpu")
        self._started = time.monotonic()
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._prefill_tokens = self._decode_tokens = self._decode_passes = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._passes = self._most_rows = 0
        self._shared_tokens = self._tried_tokens = 0

    def start_generating(self, device: torch.device) -> None:
        """Rates count from here."""
        self._device = device
        self._started = time.monotonic()
        reset_peak_host_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def count(self, results: Sequence[RowResult]) -> None:
        """Count rows that have ended."""
        self._prompt_tokens += sum(result.prompt_tokens for result in results)
        self._completion_tokens += sum(result.completion_tokens for result in results)

    def count_pass(
        self, *, rows: int, prompt_tokens: int, new_tokens: int, seconds: float, shared_tokens: int = 0, tried_tokens: int = 0
    ) -> None:
        """Count a forward pass over `rows` rows, some of which joined with their prompts; the others got `new_tokens`.

        Of the prompts `shared_tokens` need not be computed, since other rows have the same. `tried_tokens` were guessed
        beforehand. A pass with both prompts and other rows counts as one of the latter, as long as those usually take, and as
        prompts for the rest.
        """
        self._passes += 1
        self._most_rows = max(self._most_rows, rows)
        self._shared_tokens += shared_tokens
        self._tried_tokens += tried_tokens
        usual = self._decode_seconds / self._decode_passes if self._decode_passes else 0.0
        of_steps = min(seconds, usual) if prompt_tokens else seconds
        if prompt_tokens:
            self._prefill_tokens += prompt_tokens
            self._prefill_seconds += seconds - of_steps
        if new_tokens and of_steps:
            self._decode_tokens += new_tokens
            self._decode_seconds += of_steps
            self._decode_passes += 1

    def as_dict(self) -> dict[str, float]:
        """Everything so far. `tokens_per_second` is generated tokens per second since generation started.

        `prefill_tokens` are those of prompts, also where others have computed them; `decode_tokens` what further passes gave.
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
            "passes": float(self._passes),
            "largest_micro_batch": float(self._most_rows),
            "shared_prompt_tokens": float(self._shared_tokens),
            "tried_tokens": float(self._tried_tokens),
            "memory_halvings": float(self.halvings),
            "peak_host_bytes": float(peak),
            "peak_load_bytes": float(self.peak_load_bytes),
        }
        if self._device.type == "cuda":
            measured["peak_device_bytes"] = float(torch.cuda.max_memory_allocated(self._device))
        elif self._device.type == "cpu":
            measured["peak_device_bytes"] = float(max(0, peak - self._bare_host_bytes))
        moved = disk_bytes()
        if self._moved_before is not None and moved is not None:
            read, written = (now - before for now, before in zip(moved, self._moved_before, strict=True))
            measured |= {"disk_bytes_read": float(read), "disk_bytes_written": float(written)}
        return measured
