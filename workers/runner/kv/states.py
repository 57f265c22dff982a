"""How does a layer of linear attention keep what it remembers of each sequence?

Such a layer has no history, but states of a fixed size, which every token changes. Modules want them in a cache of transformers,
side by side for sequences that run together. A state cannot go back: tokens that were tried in vain would stay in it.

B sequences side by side, C channels, K of the convolution's kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from workers.runner.kv.layer import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What one layer remembers of one sequence: [1, C, K], and whatever shape its recurrence has, [1, ...]."""

    convolution_1CK: Tensor
    recurrent: Tensor


class StateLayer:
    """The states of one layer, by sequence."""

    def __init__(self) -> None:
        self._states: dict[Text, _State] = {}

    def begins(self, sequence: Text, parent: Text | None) -> bool:
        """Whether there is no state to go on from, neither of its own nor its parent's."""
        return self._of(sequence, parent) is None

    def side_by_side(self, sequences: Sequence[tuple[Text, Text | None]], layer: int) -> Cache:
        """A cache in which layer number `layer` has the states of these sequences [B, ...], each beside its parent.

        They are copies. Either all of the sequences begin or none does.
        """
        states = [state for pair in sequences if (state := self._of(*pair)) is not None]
        merged = LinearAttentionLayer()
        if states:
            convolution_BCK = torch.cat([state.convolution_1CK for state in states])
            merged.update_conv_state(convolution_BCK, conv_kernel_size=convolution_BCK.shape[-1])
            merged.update_recurrent_state(torch.cat([state.recurrent for state in states]))
        return Cache(layers=[merged] * (layer + 1))

    def keep(self, sequences: Sequence[Text], cache: Cache, layer: int) -> None:
        """Keep what a pass has made of the states of `side_by_side`."""
        merged = cache.layers[layer]
        assert isinstance(merged, LinearAttentionLayer)
        convolution_BCK, recurrent_B = merged.conv_states[0], merged.recurrent_states[0]
        assert convolution_BCK is not None
        assert recurrent_B is not None
        alone = len(sequences) == 1
        for row, sequence in enumerate(sequences):
            parts = (convolution_BCK[row : row + 1], recurrent_B[row : row + 1])
            convolution, recurrent = parts if alone else (part.clone() for part in parts)
            self._states[sequence] = _State(convolution_1CK=convolution, recurrent=recurrent)

    def forget(self, sequence: Text) -> None:
        """Keep nothing of the sequence."""
        self._states.pop(sequence, None)

    def close(self) -> None:
        """Keep nothing at all."""
        self._states.clear()

    def _of(self, sequence: Text, parent: Text | None) -> _State | None:
        own = self._states.get(sequence)
        return self._states.get(parent) if own is None and parent is not None else own
