"""What does this worker have, and what of it is free to a plan in one of its slots? The probe's answers, slot by slot."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ollm_service.core.capabilities import Capabilities, Device, LiveState
from ollm_service.core.wire import Speed
from workers.cache_folder import NoCacheFolder, take_folder
from workers.model_shelf import ModelShelf
from workers.probe import Probe
from workers.slots import Slot, Slots


class Inventory:
    """The machine, the models and the slots' cache folders, which are taken when `look` first can."""

    def __init__(self, probe: Probe, shelf: ModelShelf, slots: Slots, cache_root: Path) -> None:
        self._probe = probe
        self._shelf = shelf
        self._slots = slots
        self._cache_root = cache_root

    def look(self) -> Capabilities:
        """What the worker can do now."""
        no_cache_because = self._take_cache_folders()
        found = self._probe.capabilities(self._shelf.models, self._cache_folders(), no_cache_because)
        return replace(found, devices=tuple(self._with_speed(device) for device in found.devices))

    @property
    def speed(self) -> Speed | None:
        """What a runner has measured of the devices, the first of them so that it does not change with every start."""
        return next((slot.runner.speed for slot in self._slots.all if slot.runner.speed is not None), None)

    def free_to_fleet(self) -> LiveState:
        """What the fleet is told: the runners of free slots count as free."""
        warm = next((slot.warm_model for slot in self._slots.all if slot.warm_model is not None), None)
        return self._live(self._slots.idle(), warm)

    def free_to(self, slot: Slot) -> LiveState:
        """What a plan in this slot may take: its own runner counts as free, what the other slots have promised does not."""
        live = self._live((slot,), slot.warm_model)
        free = dict(live.device_free_bytes)
        for other in self._slots.all:
            promise = other.reserved
            if other is not slot and promise is not None:
                device_id, size = promise
                still_to_come = max(0, size - self._probe.held_by(other.runner.pid, device_id))
                free[device_id] = max(0, free.get(device_id, 0) - still_to_come)
        return replace(live, device_free_bytes=free, host_free_bytes=free.get("cpu", live.host_free_bytes))

    def _with_speed(self, device: Device) -> Device:
        speed = self.speed
        measured = speed.devices.get(device.device_id) if speed else None
        return replace(device, memory_rate=measured.memory_rate, arithmetic=measured.arithmetic) if measured else device

    def _live(self, slots: Collection[Slot], warm_model: str | None) -> LiveState:
        runners = {pid: slot.last_promise for slot in slots if (pid := slot.runner.pid) is not None}
        folder = next(iter(self._cache_folders()), None)
        others = [pid for slot in self._slots.all if (pid := slot.runner.pid) is not None and pid not in runners]
        return self._probe.live(runners, folder, warm_model, others)

    def _cache_folders(self) -> list[Path]:
        return [slot.cache_folder.path for slot in self._slots.all if slot.cache_folder is not None]

    def _take_cache_folders(self) -> str | None:
        """Give every slot a folder; the reason where one cannot have any."""
        for slot in self._slots.all:
            if slot.cache_folder is not None and not slot.cache_folder.path.is_dir():
                slot.cache_folder.release()  # somebody took it away
                slot.cache_folder = None
            if slot.cache_folder is None:
                try:
                    slot.cache_folder = take_folder(self._cache_root)
                except NoCacheFolder as error:
                    return f"no writable cache directory: {error}"
        return None
