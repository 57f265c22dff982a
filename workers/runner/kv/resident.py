"""resident: how do keys and values stay in memory, as long as a sequence runs and no longer?

Each sequence has room for all of its tokens from the first on, so that a new one costs a write of its own size and not a copy of
all that came before. A layer of sliding attention keeps its window, and as much again before it moves the window to the front.
Rooms of rows lie beside each other in one slab, as far as it was said how many there will be, each as large as the largest. On
the CPU memory is there only when it is written to.

H key heads, L new tokens, T tokens kept, D head width, S slots, C tokens of a slot, N tokens of a block.
"""

import torch
from torch import Tensor

from workers.runner.kv.layer import Arrival, History, HistoryLayer, Text
from workers.runner.kv.slots import Group, Grouping, Slots, Step
from workers.runner.packed.pack import Block, Segment
from workers.runner.raw import pages


class Room:
    """Where one sequence's keys and values are: `used` tokens from number `first` on, in a slab's `slot` or by itself."""

    __slots__ = ("first", "keys", "slot", "used", "values")

    def __init__(self, keys_HLD: Tensor, values_HLD: Tensor, capacity: int, first: int = 0) -> None:
        """Empty, for tokens like these."""
        self.keys, self.values = _room_like(keys_HLD, capacity), _room_like(values_HLD, capacity)
        self.first, self.used = first, 0
        self.slot: int | None = None

    @classmethod
    def in_slot(cls, slab: "Slab", slot: int, first: int) -> "Room":
        """Empty, in a slab."""
        slab.clean(slot)
        room = cls.__new__(cls)
        room.keys, room.values = slab.keys_SHCD[slot], slab.values_SHCD[slot]
        room.first, room.used, room.slot = first, 0, slot
        return room

    @property
    def capacity(self) -> int:
        """The most tokens."""
        return int(self.keys.shape[-2])

    def add(self, keys_HLD: Tensor, values_HLD: Tensor) -> None:
        """Take in tokens for which there is room."""
        end = self.used + keys_HLD.shape[-2]
        self.keys[:, self.used : end] = keys_HLD
        self.values[:, self.used : end] = values_HLD
        self.used = end

    def history(self) -> History:
        """All of it."""
        return History(self.keys[:, : self.used], self.values[:, : self.used], self.first)


class Slab:
    """Room for many sequences. What is beyond their tokens is always a number: it is read, with a weight of zero."""

    def __init__(self, keys_HLD: Tensor, values_HLD: Tensor, slots: int, capacity: int) -> None:
        """For tokens like these; all zero."""
        self._written = [0] * slots
        self.keys_SHCD = _zeros_like(keys_HLD, slots, capacity)
        self.values_SHCD = _zeros_like(values_HLD, slots, capacity)

    def clean(self, slot: int) -> None:
        """Nothing stays of who was there before: what a model has computed may not be a number."""
        self.keys_SHCD[slot, :, : self._written[slot]] = 0
        self.values_SHCD[slot, :, : self._written[slot]] = 0
        self._written[slot] = 0

    def leave(self, room: Room) -> None:
        """Somebody goes, and what is there stays until the next one comes."""
        if room.slot is not None:
            self._written[room.slot] = room.used

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return (self.keys_SHCD.nbytes + self.values_SHCD.nbytes) // (self.keys_SHCD.shape[0] * self.keys_SHCD.shape[2])


class ResidentLayer(HistoryLayer):
    """One layer. `window`: a token attends to so many tokens at most, itself among them. `slots` are those of its kind."""

    def __init__(self, window: int | None = None, slots: Slots | None = None) -> None:
        self._window = window
        self._slots = slots or Slots()
        self._slab: Slab | None = None
        self._rooms: dict[Text, Room] = {}

    def expect(self, rows: int, tokens: int) -> None:
        """Have slots for so many rows of so many tokens. None is in use at that time; beginnings that rows share have none."""
        assert all(room.slot is None for room in self._rooms.values()), "slots change under what is kept"
        self._slab = None
        # One row alone is reached by one operation anyway.
        self._slots.expect(rows if rows > 1 else 0, tokens if self._window is None else min(tokens, 2 * self._window))

    @property
    def has_slots(self) -> bool:
        """Whether rows may lie beside each other."""
        return self._slots.count > 0

    def append(self, arrival: Arrival, keys_HLD: Tensor, values_HLD: Tensor) -> None:
        """Take in new tokens."""
        new, room = keys_HLD.shape[-2], self._rooms.get(arrival.sequence)
        if room is None:
            goes_on = not arrival.is_prompt or arrival.start + new + arrival.more < arrival.sequence.capacity
            room = self._rooms[arrival.sequence] = self._new(arrival.sequence, keys_HLD, values_HLD, new, goes_on=goes_on)
        elif room.used + new > room.capacity:
            room = self._make_room(room, arrival.sequence, new)
        room.add(keys_HLD, values_HLD)

    def grouping(self, block: Block, device: torch.device) -> Grouping:
        """Rows with one new token, in neighbouring slots."""
        known = self._slots.known(block)
        if known is not None:
            for one in (one for group in known.groups for one in group.segments if self._window is not None):
                self._with_room(one)
            return known
        steps: list[Step] = []
        others: list[Segment] = []
        for one in block.segments:
            room = None if one.is_prompt or one.length > 1 else self._with_room(one)
            if room is None or room.slot is None:
                others.append(one)
            else:
                steps.append(Step(segment=one, slot=room.slot, tokens=room.used + 1))
        return self._slots.group(block, steps, others, device, 0 if self._slab is None else self._slab.token_bytes)

    def append_group(self, group: Group, keys_HND: Tensor, values_HND: Tensor) -> None:
        """Take in the new token of each of its sequences."""
        slab = self._slab
        assert slab is not None
        slab.keys_SHCD[group.slot_B, :, group.at_B] = keys_HND[:, group.place_B].transpose(0, 1)
        slab.values_SHCD[group.slot_B, :, group.at_B] = values_HND[:, group.place_B].transpose(0, 1)
        for one in group.segments:
            self._rooms[one.sequence].used += 1

    def group_history(self, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and values [S, H, T, D] of its slots."""
        slab = self._slab
        assert slab is not None
        return slab.keys_SHCD[group.slots, :, : group.tokens], slab.values_SHCD[group.slots, :, : group.tokens]

    def history(self, sequence: Text) -> History:
        """Everything that is kept."""
        return self._rooms[sequence].history()

    def truncate(self, sequence: Text, tokens: int) -> None:
        """Forget the newest."""
        room, kept = self._rooms[sequence], tokens - self._rooms[sequence].first
        if room.slot is not None:
            room.keys[:, kept : room.used] = 0
            room.values[:, kept : room.used] = 0
        room.used = kept

    def forget(self, sequence: Text) -> None:
        """Give the room back."""
        room = self._rooms.pop(sequence, None)
        if room is not None and self._slab is not None:
            self._slab.leave(room)
        self._slots.give_back(sequence)

    def close(self) -> None:
        """Give all rooms back."""
        for sequence in list(self._rooms):
            self.forget(sequence)
        self._slab = None

    def _new(self, sequence: Text, keys_HLD: Tensor, values_HLD: Tensor, needed: int, first: int = 0, *, goes_on: bool) -> Room:
        """A slot's room for what goes on beyond its prompt; other sequences never have a step."""
        capacity = self._capacity(sequence, needed)
        slot = self._slots.take(sequence, capacity) if goes_on else None
        if slot is None:
            return Room(keys_HLD, values_HLD, capacity, first)
        if self._slab is None:
            self._slab = Slab(keys_HLD, values_HLD, self._slots.count, self._slots.capacity)
        return Room.in_slot(self._slab, slot, first)

    def _with_room(self, step: Segment) -> Room | None:
        """Where a new token of a sequence goes; None where it is its first."""
        room = self._rooms.get(step.sequence)
        if room is not None and room.used == room.capacity:
            return self._make_room(room, step.sequence, 1)
        return room

    def _make_room(self, room: Room, sequence: Text, new: int) -> Room:
        """Go on with as many tokens as a window still shows, in a room for so many more."""
        kept = room.used if self._window is None else min(room.used, self._window - 1)
        start = room.used - kept
        # Copied, since the new room may be the same slot.
        keys, values = room.keys[:, start : room.used].clone(), room.values[:, start : room.used].clone()
        if self._slab is not None:
            self._slab.leave(room)
        goes_on = self._slots.has(sequence)
        made = self._rooms[sequence] = self._new(sequence, keys, values, kept + new, room.first + start, goes_on=goes_on)
        made.add(keys, values)
        return made

    def _capacity(self, sequence: Text, needed: int) -> int:
        expected = sequence.capacity if self._window is None else min(sequence.capacity, 2 * self._window)
        return max(needed, expected)


def _room_like(states_HLD: Tensor, tokens: int) -> Tensor:
    heads, _, width = states_HLD.shape
    return states_HLD.new_empty((heads, tokens, width))


def _zeros_like(states_HLD: Tensor, slots: int, tokens: int) -> Tensor:
    """Memory of the CPU is not there before it is written to."""
    heads, _, width = states_HLD.shape
    if states_HLD.device.type != "cpu":
        return states_HLD.new_zeros((slots, heads, tokens, width))
    size = slots * heads * tokens * width
    return pages(size * states_HLD.element_size()).view(states_HLD.dtype)[:size].view(slots, heads, tokens, width)
