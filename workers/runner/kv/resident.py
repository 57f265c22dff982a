"""resident: how do keys and values stay in memory, as long as a sequence runs and no longer?

Each sequence has room for all of its tokens from the first on, so that a new one costs a write of its own size and not a copy of
all that came before. A layer of sliding attention keeps its window, and as much again before it moves the window to the front.

H key heads, L new tokens, T tokens kept, D head width.
"""

from torch import Tensor

from workers.runner.kv.layer import Arrival, History, HistoryLayer, Text


class Room:
    """Where one sequence's keys and values are: `used` tokens from number `first` on."""

    __slots__ = ("first", "keys", "used", "values")

    def __init__(self, keys_HLD: Tensor, values_HLD: Tensor, capacity: int, first: int = 0) -> None:
        """Empty, for tokens like these."""
        self.keys, self.values = _room_like(keys_HLD, capacity), _room_like(values_HLD, capacity)
        self.first, self.used = first, 0

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

    def newest(self, tokens: int, capacity: int) -> "Room":
        """Another room, with the newest tokens."""
        start = self.used - tokens
        keys, values = self.keys[:, start : self.used], self.values[:, start : self.used]
        room = Room(keys, values, capacity, self.first + start)
        room.add(keys, values)
        return room

    def history(self) -> History:
        """All of it."""
        return History(self.keys[:, : self.used], self.values[:, : self.used], self.first)


class ResidentLayer(HistoryLayer):
    """One layer. `window`: a token attends to so many tokens at most, itself among them."""

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self._rooms: dict[Text, Room] = {}

    def append(self, arrival: Arrival, keys_HLD: Tensor, values_HLD: Tensor) -> None:
        """Take in new tokens."""
        new, room = keys_HLD.shape[-2], self._rooms.get(arrival.sequence)
        if room is None:
            room = self._rooms[arrival.sequence] = Room(keys_HLD, values_HLD, self._capacity(arrival.sequence, new))
        elif room.used + new > room.capacity:
            kept = room.used if self._window is None else min(room.used, self._window - 1)
            room = self._rooms[arrival.sequence] = room.newest(kept, self._capacity(arrival.sequence, kept + new))
        room.add(keys_HLD, values_HLD)

    def history(self, sequence: Text) -> History:
        """Everything that is kept."""
        return self._rooms[sequence].history()

    def truncate(self, sequence: Text, tokens: int) -> None:
        """Forget the newest."""
        room = self._rooms[sequence]
        room.used = tokens - room.first

    def forget(self, sequence: Text) -> None:
        """Give the room back."""
        self._rooms.pop(sequence, None)

    def close(self) -> None:
        """Give all rooms back."""
        self._rooms.clear()

    def _capacity(self, sequence: Text, needed: int) -> int:
        expected = sequence.capacity if self._window is None else min(sequence.capacity, 2 * self._window)
        return max(needed, expected)


def _room_like(states_HLD: Tensor, tokens: int) -> Tensor:
    heads, _, width = states_HLD.shape
    return states_HLD.new_empty((heads, tokens, width))
