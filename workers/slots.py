"""Which of this worker's slots are free, and what does each keep warm and reserve?

A slot runs one plan at a time, in a runner of its own, with a cache folder of its own.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from workers.cache_folder import CacheFolder
from workers.supervisor import RunnerProcess


class Slot:
    """One slot. Its thread alone calls `ready_runner` and `working`; others may read."""

    def __init__(self, number: int, runner: RunnerProcess) -> None:
        self.number = number
        self.runner = runner
        self.cache_folder: CacheFolder | None = None
        self.warm_model: str | None = None
        self.last_promise: tuple[str, int] | None = None
        self._reserved: tuple[str, int] | None = None
        self._pause = threading.Event()

    @property
    def reserved(self) -> tuple[str, int] | None:
        """The device and the bytes that its plan may take, while it has one."""
        return self._reserved

    def reserve(self, device_id: str, size: int) -> None:
        """Say what the plan at hand may take. The runner may keep it, so it is remembered as long as that runs."""
        self._reserved = self.last_promise = (device_id, size)

    @contextmanager
    def working(self) -> Iterator[None]:
        """While a plan is here."""
        try:
            yield
        finally:
            self._reserved = None

    def ready_runner(self) -> bool:
        """Make sure that a runner runs; True if it is a new one, whose cache folder was swept first. Raises OSError."""
        if self.runner.is_usable:
            return False
        self.warm_model = self.last_promise = None
        self.runner.close()
        if self.cache_folder is not None:
            self.cache_folder.sweep()
        return self.runner.start()

    def has_warm(self, digest: str | None) -> bool:
        """Whether its runner lives and holds this model."""
        return digest is not None and self.warm_model == digest and self.runner.is_usable

    def pause(self, seconds: float) -> None:
        """Wait, or less once the slot is closed."""
        self._pause.wait(seconds)

    def close(self) -> None:
        """End the runner and give the cache folder back."""
        self._pause.set()
        self.runner.close()
        if self.cache_folder is not None:
            self.cache_folder.release()
            self.cache_folder = None


class Slots:
    """All slots of a worker: who needs one takes it, and gives it back."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.all = tuple(slots)
        self._free = list(reversed(self.all))
        self._lock = threading.Lock()

    def take(self) -> Slot | None:
        """A free slot, or None; one whose runner is warm first."""
        with self._lock:
            if not self._free:
                return None
            warm = [slot for slot in self._free if slot.warm_model is not None]
            slot = warm[-1] if warm else self._free[-1]
            self._free.remove(slot)
            return slot

    def give_back(self, slot: Slot) -> None:
        """The slot is free again."""
        with self._lock:
            self._free.append(slot)

    @property
    def free_count(self) -> int:
        """How many are free now."""
        with self._lock:
            return len(self._free)

    def idle(self) -> tuple[Slot, ...]:
        """Those that are free now."""
        with self._lock:
            return tuple(self._free)
