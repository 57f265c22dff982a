"""What is the cache that a pack's forward pass is given? A layer of ours for each of the model's, and the block that is computed.

N tokens of the block, H key heads, D head width.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ollm_service.core.packing import MOST_CELLS
from workers.runner.kv.layer import Arrival, HistoryLayer
from workers.runner.kv.resident import ResidentLayer
from workers.runner.kv.slots import Grouping, Slots
from workers.runner.kv.states import StateLayer
from workers.runner.packed.pack import Block, TokenSequence

FullLayers = Callable[[int, int], HistoryLayer]


class PackCache(Cache):
    """Keys and values of the sequences that run. `block` is what is being computed, set before each layer's forward,
    `grouping` how the layer that was updated last has taken it in.

    `keeps_all`: every token that was given is kept, so that beginnings can be shared and tokens tried in advance. Attention
    computes at most `most_cells` scores at a time.
    """

    def __init__(
        self, layers: Sequence[HistoryLayer | StateLayer], *, keeps_all: bool = True, most_cells: int = MOST_CELLS
    ) -> None:
        super().__init__(layers=[])
        self.parts = list(layers)
        self.block = Block(begin=0, end=0, segments=())
        self.has_states = any(isinstance(part, StateLayer) for part in self.parts)
        self.keeps_all = keeps_all
        self.most_cells = most_cells
        self.grouping = Grouping(others=())
        self.attention_calls = 0

    @property
    def can_go_back(self) -> bool:
        """Whether tokens can be taken back."""
        return self.keeps_all and not self.has_states

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the block's keys and values [1, H, N, D] to their sequences. Raises OSError."""
        layer = self.history_layer(layer_idx)
        if isinstance(layer, ResidentLayer):
            self.grouping = layer.grouping(self.block, key_states.device)
            for group in self.grouping.groups:
                layer.append_group(group, key_states[0], value_states[0])
        else:
            self.grouping = Grouping(others=self.block.segments)
        for one in self.grouping.others:
            arrival = Arrival(sequence=one.sequence, start=one.start, is_prompt=one.is_prompt, more=one.more)
            layer.append(arrival, key_states[0, :, one.begin : one.end], value_states[0, :, one.begin : one.end])
        return key_states, value_states

    def history_layer(self, number: int) -> HistoryLayer:
        """A layer of attention."""
        layer = self.parts[number]
        assert isinstance(layer, HistoryLayer), number
        return layer

    def state_layer(self, number: int) -> StateLayer:
        """A layer of linear attention."""
        layer = self.parts[number]
        assert isinstance(layer, StateLayer), number
        return layer

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        """Nothing that a module could count on: positions are given."""
        return 0

    @property
    def has_slots(self) -> bool:
        """Whether memory is kept for more rows than there may be now."""
        return any(isinstance(part, ResidentLayer) and part.has_slots for part in self.parts)

    def expect(self, rows: int, tokens: int) -> None:
        """At most so many sequences will go on beyond their prompts at a time, each of at most so many tokens of its own.

        To be told while nothing is kept. What is more than expected has room, too, but is reached by itself.
        """
        for part in self.parts:
            if isinstance(part, ResidentLayer):
                part.expect(rows, tokens)

    def truncate(self, sequence: TokenSequence) -> None:
        """Forget the tokens behind those that count as cached."""
        for part in self.parts:
            if isinstance(part, HistoryLayer):
                part.truncate(sequence, sequence.cached)

    def forget(self, sequence: TokenSequence) -> None:
        """Keep nothing of the sequence."""
        for part in self.parts:
            part.forget(sequence)

    def close(self) -> None:
        """Keep nothing at all."""
        for part in self.parts:
            part.close()


def layers_of(module: PreTrainedModel, full: FullLayers | None = None) -> list[HistoryLayer | StateLayer]:
    """A layer for each of the model's. Where it keeps its full history that is `full(index, count)`, or resident.

    Raises TypeError for a kind of layer that is none of full, sliding and linear attention.
    """
    theirs = DynamicCache(config=module.config).layers
    count, made = sum(type(layer) is DynamicLayer for layer in theirs), 0
    layers: list[HistoryLayer | StateLayer] = []
    slots: dict[int | None, Slots] = defaultdict(Slots)
    for layer in theirs:
        if type(layer) is DynamicLayer:
            layers.append(full(made, count) if full is not None else ResidentLayer(slots=slots[None]))
            made += 1
        elif isinstance(layer, DynamicSlidingWindowLayer):
            layers.append(ResidentLayer(layer.sliding_window, slots[layer.sliding_window]))
        elif type(layer) is LinearAttentionLayer:
            layers.append(StateLayer())
        else:
            raise TypeError(f"no cache for a {type(layer).__name__}")
    return layers
