"""How much memory does this machine, or the container that we are in, have and have free?"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Bytes in all, and bytes that could be taken now without swapping."""

    total: int
    free: int


def host_memory(*, cgroups: Path = CGROUPS, own_cgroup: Path = OWN_CGROUP) -> HostMemory:
    """The machine's memory, or less where a control group (v1 or v2) allows less."""
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for limit, used in _limits(cgroups, own_cgroup):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return HostMemory(total=total, free=free)


def private_bytes(pid: int) -> int:
    """The memory that would be free if this process ended; 0 for one that is gone.

    Pages of files that it maps are left out: the machine counts those as available already.
    """
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return max(0, int(memory.rss) - int(getattr(memory, "shared", 0)))


def _limits(cgroups: Path, own_cgroup: Path) -> Iterable[tuple[int, int]]:
    """The limit and the unreclaimable use of every control group that we are in, in bytes."""
    try:
        lines = own_cgroup.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _along(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _along(cgroups / "memory", path, *names)


def _along(root: Path, path: str, limit_name: str, used_name: str, reclaimable_name: str) -> Iterable[tuple[int, int]]:
    """The group's own limit and its ancestors', up to what this mount shows."""
    relative = PurePosixPath(path.lstrip("/"))
    for part in (relative, *relative.parents):
        group = root / part
        try:
            limit = int((group / limit_name).read_text(encoding="ascii"))
            used = int((group / used_name).read_text(encoding="ascii"))
            statistics = (group / "memory.stat").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            continue  # no limit here, which reads "max", or not our mount
        reclaimable = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(reclaimable_name, "0")
        yield limit, max(0, used - int(reclaimable))
