"""Where do many sequences' keys and values lie beside each other, so that one operation reaches those of all rows?

Layers that keep equally much of a sequence share these slots: each has room for so many sequences of so many tokens, and a
sequence has the same slot in all of them. A pass has one new token for most rows. Those whose slots are neighbours form a group,
as long as reading up to the longest of them costs less than asking once more.

S slots of a group, B of them with a new token, T tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise

import torch
from torch import Tensor

from workers.runner.packed.pack import Block, Segment

# Asking for one more group takes about as long as reading so much in vain: 0.1 ms on a CPU; on a GPU every call is many kernels.
_BYTES_OF_A_CALL = {"cpu": 2**20}
_BYTES_OF_A_GPU_CALL = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A sequence's one new token, its slot, and how many tokens are in there with it."""

    segment: Segment
    slot: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Neighbouring slots, most of which get one new token each.

    `slot_B` and `at_B` are where new tokens go, `place_B` where they are in the block. Of every slot `place_S` is that, too, or
    any where nothing is new, `tokens_S` how much of it is seen; `member_B` are the slots that count, None for all.
    """

    segments: tuple[Segment, ...]
    slots: slice
    tokens: int
    slot_B: Tensor
    at_B: Tensor
    place_B: slice | Tensor
    place_S: slice | Tensor
    tokens_S: Tensor
    member_B: Tensor | None
    are_equal: bool
    _seen: dict[int | None, Tensor | None] = field(default_factory=dict)

    def seen(self, window: int | None) -> Tensor | None:
        """Which tokens each slot's newest sees, [S, 1, 1, T]; None for all. Made once, for all layers."""
        if window not in self._seen:
            self._seen[window] = self._visible(window)
        return self._seen[window]

    def _visible(self, window: int | None) -> Tensor | None:
        if self.are_equal and (window is None or self.tokens <= window):
            return None
        back_ST = self.tokens_S.unsqueeze(-1) - 1 - torch.arange(self.tokens, device=self.tokens_S.device)
        seen_ST = back_ST >= 0 if window is None else (back_ST >= 0) & (back_ST < window)
        return seen_ST[:, None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """How a block's segments are kept and seen: in groups, and the others each by itself."""

    groups: tuple[Group, ...] = ()
    others: Sequence[Segment]


class Slots:
    """Who has which slot, in all layers with the same window."""

    def __init__(self, bytes_of_a_call: int | None = None) -> None:
        """Reading so much in vain is worth sparing a call; None: what was seen of such devices."""
        self.count = self.capacity = 0
        self._bytes_of_a_call = bytes_of_a_call
        self._free: list[int] = []
        self._taken: dict[object, int] = {}

    def expect(self, count: int, capacity: int) -> None:
        """From now on so many slots for so many tokens each, all free."""
        self.count, self.capacity = count, capacity
        self._free, self._taken = list(range(count)), {}
        heapify(self._free)

    def take(self, sequence: object, capacity: int) -> int | None:
        """The sequence's slot, if it has as much room; None where none was free. It stays the sequence's in any case."""
        if sequence not in self._taken and self._free:
            self._taken[sequence] = heappop(self._free)
        return self._taken.get(sequence) if capacity <= self.capacity else None

    def has(self, sequence: object) -> bool:
        """Whether a slot is the sequence's, wherever that is now."""
        return sequence in self._taken

    def give_back(self, sequence: object) -> None:
        """It ends, in all layers."""
        slot = self._taken.pop(sequence, None)
        if slot is not None:
            heappush(self._free, slot)

    def known(self, block: Block) -> Grouping | None:
        """What another layer has made of this block."""
        known: Grouping | None = block.groupings.get(self)
        return known

    def group(
        self, block: Block, steps: Sequence[Step], others: Sequence[Segment], device: torch.device, token_bytes: int
    ) -> Grouping:
        """These tokens of a block in groups of two or more, for this layer and those that ask next.

        Keys and values of a token are so many bytes.
        """
        usual = _BYTES_OF_A_CALL.get(device.type, _BYTES_OF_A_GPU_CALL)
        most = usual if self._bytes_of_a_call is None else self._bytes_of_a_call
        neighbours = _neighbours(steps, most // max(1, token_bytes))
        groups = tuple(_group(members, device) for members in neighbours if len(members) > 1)
        alone = [members[0].segment for members in neighbours if len(members) == 1]
        made = block.groupings[self] = Grouping(groups=groups, others=(*others, *alone))
        return made


def _neighbours(steps: Sequence[Step], most_in_vain: int) -> list[list[Step]]:
    """In the order of their slots; another begins where one more slot would have too many tokens read in vain."""
    found: list[list[Step]] = []
    read = 0
    for step in sorted(steps, key=lambda one: one.slot):
        if found:
            members = found[-1]
            longest = max(step.tokens, read // (members[-1].slot - members[0].slot + 1))
            more = longest * (step.slot - members[0].slot + 1) - read - step.tokens
            if more <= most_in_vain:
                members.append(step)
                read += step.tokens + more
                continue
        found.append([step])
        read = step.tokens
    return found


def _group(members: Sequence[Step], device: torch.device) -> Group:
    first, end = members[0].slot, members[-1].slot + 1
    by_slot = {one.slot: one for one in members}
    every = [by_slot.get(slot, members[0]) for slot in range(first, end)]

    def numbers(found: Sequence[int]) -> Tensor:
        return torch.tensor(found).to(device, non_blocking=True)

    def places(found: Sequence[Step]) -> slice | Tensor:
        begins = [one.segment.begin for one in found]
        return slice(begins[0], begins[-1] + 1) if all(a + 1 == b for a, b in pairwise(begins)) else numbers(begins)

    return Group(
        segments=tuple(one.segment for one in members),
        slots=slice(first, end),
        tokens=max(one.tokens for one in members),
        slot_B=numbers([one.slot for one in members]),
        at_B=numbers([one.tokens - 1 for one in members]),
        place_B=places(members),
        place_S=places(every),
        tokens_S=numbers([one.tokens for one in every]),
        member_B=None if len(members) == len(every) else numbers([one.slot - first for one in members]),
        are_equal=len({one.tokens for one in every}) == 1,
    )
