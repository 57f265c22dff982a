"""How do layers of linear attention run in a pack? They go through a text from its beginning, so each sequence goes alone, with
its state; sequences with one new token each go side by side.

N tokens of the block, C width of the hidden states, B sequences side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workers.runner.kv.cache import PackCache
from workers.runner.kv.states import StateLayer
from workers.runner.packed.pack import Segment


def in_pack(forward: Callable[..., Tensor], module: nn.Module) -> Callable[..., Tensor]:
    """The forward of a linear attention module, given hidden states [1, N, C] of a block's sequences one after another."""
    number = module.layer_idx
    assert isinstance(number, int)

    def run(hidden_states: Tensor, cache_params: PackCache | None = None, **_options: Any) -> Tensor:
        assert cache_params is not None
        layer = cache_params.state_layer(number)
        output_1NC = torch.empty_like(hidden_states)
        for together in _groups(cache_params.block.segments, layer):
            places = _places(together, hidden_states.device)
            given_BLC = hidden_states[0, places].view(len(together), -1, hidden_states.shape[-1])
            states = layer.side_by_side([(one.sequence, one.sequence.parent) for one in together], number)
            found_BLC = forward(given_BLC, cache_params=states, attention_mask=None)
            layer.keep([one.sequence for one in together], states, number)
            output_1NC[0, places] = found_BLC.flatten(0, 1)
        return output_1NC

    return run


def _places(together: Sequence[Segment], device: torch.device) -> slice | Tensor:
    """Where they are: of one segment without an index on the device, of several, which have one token each, with one."""
    if len(together) == 1:
        return slice(together[0].begin, together[0].end)
    return torch.tensor([one.begin for one in together]).to(device, non_blocking=True)


def _groups(segments: Sequence[Segment], layer: StateLayer) -> Iterator[list[Segment]]:
    """Each prompt alone, in order, since one may go on from another; then all that have a state and one new token."""
    steps: list[Segment] = []
    for one in segments:
        if one.length == 1 and not one.is_prompt and not layer.begins(one.sequence, one.sequence.parent):
            steps.append(one)
        else:
            yield [one]
    if steps:
        yield steps
