"""Which layers may leave a device, and what does each choice change there and in host memory? Sizes in bytes.

The choices are in the order of how many layers leave, fewest first; there is one alone where the user has said which or how many.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ollm_service.core.capabilities import Capabilities
from ollm_service.core.layout import Layout
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.passing import HOST_SLOTS, passing_experts, passing_layers, slots_of, tile_bytes
from ollm_service.core.plan import PassId, RuntimePlan
from ollm_service.core.profile import ModelProfile


def has_demanded_layers(profile: ModelProfile, config: RuntimeConfig) -> bool:
    """Whether layers leave the device because the user said how many, or which."""
    return config.offload_cpu_layers > 0 or 0 < config.offload_gpu_layers < profile.layer_count


def is_routed(plan: RuntimePlan, capabilities: Capabilities) -> bool:
    """Whether layers that leave the device do so without their experts: the plan and the worker have moe-routing."""
    is_planned = PassId.MOE_ROUTING in plan.specialization_pass_ids
    return is_planned and capabilities.passes.get(PassId.MOE_ROUTING, "not known to this worker") is None


def offloaded_layers(total: int, count: int, policy: str) -> range:
    """Which `count` of `total` layers leave the device: the first, the last, or a band in the middle, which `auto` means, too.

    A larger count keeps the layers of a smaller one. No more than there are.
    """
    count = min(count, total)
    start = {"prefix": 0, "suffix": total - count}.get(policy, (total - count) // 2)
    return range(start, start + count)


@dataclass(frozen=True, slots=True)
class LeavingLayers:
    """For each choice the layers that leave, what that changes on the device, and what host memory needs for it.

    On the device they go, and what they pass through comes.
    """

    choices: Sequence[Sequence[int]]
    device: Sequence[int]
    host: Sequence[int]
    sizes: Sequence[int]
    from_disk: bool

    @classmethod
    def of(cls, profile: ModelProfile, config: RuntimeConfig, layout: Layout, *, from_disk: bool) -> "LeavingLayers":
        """The choices for a model whose layers can be told apart, with the layout of everything on the device."""
        choices, sizes = _choices(profile, config), profile.layer_bytes
        left = _sums(sizes, choices)
        pieces = _largest(passing_layers(profile, is_routed=layout.is_routed), choices)
        experts = _largest(passing_experts(profile, is_routed=layout.is_routed), choices)
        on_disk = layout.vocabulary_on_disk
        slots = [slots_of(profile, *largest, vocabulary_on_disk=on_disk) for largest in zip(pieces, experts, strict=True)]
        if layout.device_kind == "cpu":
            host = [0] * len(choices)
        elif from_disk:
            tile = tile_bytes(profile) * on_disk
            host = [HOST_SLOTS * max(largest, tile) for largest in _largest(sizes, choices)]
        else:
            host = left
        device = [passing - gone for passing, gone in zip(slots, left, strict=True)]
        return cls(choices, device, host, sizes, from_disk)

    def fewest(self, device_left: int, host_left: int) -> int | None:
        """The position of the first choice that fits what is left beside everything else."""
        fitting = (n for n in range(len(self.choices)) if self.device[n] <= device_left and self.host[n] <= host_left)
        return next(fitting, None)

    def nearest(self, device_left: int) -> int:
        """Where none fits, the position of what needs least: of host memory if the device has room, else of the device."""
        able = [n for n in range(len(self.choices)) if self.device[n] <= device_left]
        return min(able or range(len(self.choices)), key=lambda n: self.host[n] if able else self.device[n])

    def laid_out(self, layout: Layout, position: int, host_left: int) -> Layout:
        """The layers by name; of those that come from disk as many as `host_left` holds are kept in host memory."""
        leaving = self.choices[position]
        if not self.from_disk:
            return replace(layout, host_layers=tuple(leaving))
        if layout.device_kind == "cpu":
            return replace(layout, disk_layers=tuple(leaving))
        kept, left = 0, host_left - self.host[position]
        while kept < len(leaving) - 1 and self.sizes[leaving[kept]] <= left:
            left -= self.sizes[leaving[kept]]
            kept += 1
        return replace(layout, host_layers=tuple(leaving[:kept]), disk_layers=tuple(leaving[kept:]))


def _choices(profile: ModelProfile, config: RuntimeConfig) -> Sequence[Sequence[int]]:
    """All numbers of layers, or the one that was asked for."""
    total = len(profile.layer_bytes)
    if config.exact_cpu_layers:
        return [config.exact_cpu_layers]
    if config.offload_cpu_layers:
        return [offloaded_layers(total, config.offload_cpu_layers, config.offload_cpu_policy)]
    if has_demanded_layers(profile, config):
        return [offloaded_layers(total, total - config.offload_gpu_layers, "suffix")]
    return [offloaded_layers(total, count, config.offload_cpu_policy) for count in range(1, total + 1)]


def _sums(sizes: Sequence[int], choices: Sequence[Sequence[int]]) -> list[int]:
    """What the layers of each choice weigh; those of one among several lie together."""
    if len(choices) == 1:
        return [sum(sizes[layer] for layer in choices[0])]
    sums = list(accumulate(sizes, initial=0))
    return [sums[layers[-1] + 1] - sums[layers[0]] for layers in choices]


def _largest(sizes: Sequence[int], choices: Sequence[Sequence[int]]) -> list[int]:
    """The largest of each choice; of several each has the layers of the one before, and one more at its ends."""
    found = [max(sizes[layer] for layer in choices[0])]
    for layers in choices[1:]:
        found.append(max(found[-1], sizes[layers[0]], sizes[layers[-1]]))
    return found
