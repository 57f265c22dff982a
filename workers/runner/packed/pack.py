"""Which tokens go through the model in one forward pass, and whose are they?

A pack is the new tokens of many sequences one after another: prompts, and the newest tokens of rows that have answered a part. A
forward pass costs one reading of the weights however many tokens are in it. Inside each layer a pack is computed in blocks of
bounded size, so that its wide intermediates exist for one block at a time.

N tokens of a pack, M of them whose logits are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, eq=False, kw_only=True)
class TokenSequence:
    """Tokens that attend to each other in their order: a row's, or a beginning that several rows share.

    `tokens` are those of its own, which come after all of `parent`'s. `capacity` is the most that they will ever be, as far as is
    known. Of its tokens, `cached` have keys and values in the cache. Tokens of one of the `spans`, from and to, see each other
    whatever their order, as those of an image do; such a prompt is computed in one block.
    """

    tokens: list[int]
    capacity: int
    parent: "TokenSequence | None" = None
    cached: int = 0
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def first_position(self) -> int:
        """The position of the first token of its own."""
        return 0 if self.parent is None else self.parent.length

    @property
    def length(self) -> int:
        """All tokens, the parent's included."""
        return self.first_position + len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A sequence's tokens in a pack or a block of one, from place `begin` on.

    `start` of the sequence's own tokens came before them. Of the last `wanted` the logits are wanted. `is_prompt`: they belong
    to a prompt, which sees all of itself whatever a cache keeps of it later; where a block cuts it, `more` of it come in the
    next.
    """

    sequence: TokenSequence
    begin: int
    start: int
    length: int
    is_prompt: bool
    wanted: int = 0
    more: int = 0

    @property
    def end(self) -> int:
        """The place behind its last token."""
        return self.begin + self.length

    @property
    def first_position(self) -> int:
        """The position of its first token in the whole text."""
        return self.sequence.first_position + self.start

    def between(self, begin: int, end: int) -> "Segment | None":
        """What of it lies in a block of these places, counted from the block's beginning."""
        first, last = max(begin, self.begin), min(end, self.end)
        if first >= last:
            return None
        return Segment(
            sequence=self.sequence,
            begin=first - begin,
            start=self.start + first - self.begin,
            length=last - first,
            is_prompt=self.is_prompt,
            more=self.end - last,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sharing:
    """Sequences of a block that go on from the same beginning: their tokens' places in the block, and positions, [L].

    Positions are on the CPU, so that no device has to be waited for to compare them.
    """

    parent: TokenSequence
    positions_L: Tensor
    places_L: Tensor
    _copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def places(self, device: torch.device) -> Tensor:
        """The places, on a device; copied there once for all layers."""
        if device not in self._copies:
            self._copies[device] = self.places_L.to(device, non_blocking=True)
        return self._copies[device]

    @classmethod
    def of(cls, parent: TokenSequence, children: Sequence[Segment]) -> "Sharing":
        """What these segments share."""
        places = [place for one in children for place in range(one.begin, one.end)]
        positions = [place for one in children for place in range(one.first_position, one.first_position + one.length)]
        return cls(parent=parent, positions_L=torch.tensor(positions), places_L=torch.tensor(places))


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """The places of a pack that a layer computes at a time."""

    begin: int
    end: int
    segments: tuple[Segment, ...]
    groupings: dict[object, Any] = field(default_factory=dict)  # what caches have made of it, by whose slots they are

    @cached_property
    def shared(self) -> list[Sharing]:
        """Which of the segments share a beginning, the same for all layers."""
        groups: dict[TokenSequence, list[Segment]] = {}
        for segment in self.segments:
            if segment.sequence.parent is not None:
                groups.setdefault(segment.sequence.parent, []).append(segment)
        return [Sharing.of(parent, children) for parent, children in groups.items()]


@dataclass(slots=True)
class Pack:
    """Segments in the order in which they lie: what a sequence attends to comes before it."""

    segments: list[Segment] = field(default_factory=list)
    length: int = 0

    def add(self, sequence: TokenSequence, *, wanted: int, is_prompt: bool) -> Segment:
        """Take in all of the sequence's tokens that are not cached yet."""
        count = len(sequence.tokens) - sequence.cached
        segment = Segment(
            sequence=sequence, begin=self.length, start=sequence.cached, length=count, is_prompt=is_prompt, wanted=wanted
        )
        self.segments.append(segment)
        self.length += count
        return segment

    def has(self, sequence: TokenSequence) -> bool:
        """Whether tokens of the sequence are in it."""
        return any(segment.sequence is sequence for segment in self.segments)

    def tokens_N(self) -> Tensor:
        """The token ids."""
        return torch.tensor([token for one in self.segments for token in one.sequence.tokens[one.start :]], dtype=torch.long)

    def positions_N(self) -> Tensor:
        """Where each stands in its own text."""
        ranges = [torch.arange(one.first_position, one.first_position + one.length) for one in self.segments]
        return torch.cat(ranges)

    def wanted_M(self) -> Tensor:
        """The places whose logits are wanted."""
        return torch.tensor([place for one in self.segments for place in range(one.end - one.wanted, one.end)], dtype=torch.long)

    def blocks(self, most_tokens: int) -> list[Block]:
        """The pack cut into pieces of at most so many tokens; a segment may be cut, too, unless tokens of it see ahead.

        Such a one that is longer is a piece by itself.
        """
        whole = [segment for segment in self.segments if segment.is_prompt and segment.sequence.spans]
        ends = [0]
        while ends[-1] < self.length:
            begin, end = ends[-1], min(ends[-1] + most_tokens, self.length)
            cut = next((one for one in whole if one.begin < end < one.end), None)
            if cut is not None:
                end = cut.begin if cut.begin > begin else cut.end
            ends.append(end)
        return [self._block(begin, end) for begin, end in pairwise(ends)]

    def _block(self, begin: int, end: int) -> Block:
        parts = (segment.between(begin, end) for segment in self.segments)
        return Block(begin=begin, end=end, segments=tuple(part for part in parts if part is not None))
