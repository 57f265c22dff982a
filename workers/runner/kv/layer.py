"""What does one layer of a cache keep of each sequence, and how is it asked for it?

H key heads, L new tokens, T tokens kept, D head width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Text(Protocol):
    """A sequence to a cache: an identity, and the most tokens of its own that it is expected to have."""

    capacity: int


class History(NamedTuple):
    """Keys and values [H, T, D] of a sequence's tokens from number `first` on, which are good until the layer is used again."""

    keys_HTD: Tensor
    values_HTD: Tensor
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """New tokens of a sequence that has had `start` before.

    Those of a prompt see all that came before them, and `more` of the same prompt come after them in the same pass.
    """

    sequence: Text
    start: int
    is_prompt: bool
    more: int = 0


class HistoryLayer(ABC):
    """Keys and values of past tokens, in one layer."""

    @abstractmethod
    def append(self, arrival: Arrival, keys_HLD: Tensor, values_HLD: Tensor) -> None:
        """Take in new tokens. Raises OSError."""

    @abstractmethod
    def history(self, sequence: Text) -> History:
        """What the newest tokens of a sequence may attend to, themselves included. Raises OSError, KeyError."""

    @abstractmethod
    def truncate(self, sequence: Text, tokens: int) -> None:
        """Forget the tokens behind the first `tokens`: those that the newest pass has tried in vain."""

    @abstractmethod
    def forget(self, sequence: Text) -> None:
        """Keep nothing of the sequence."""

    @abstractmethod
    def close(self) -> None:
        """Keep nothing at all."""
