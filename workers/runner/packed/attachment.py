"""How is a model made to run in packs, and how does one pass go?

Nothing of transformers is changed but our own instance of a model, for as long as it is attached: its attention is computed by
the function that we registered, each decoder layer takes a long pack in blocks, and layers of linear attention get their
sequences one by one.

N tokens of the pack, M of them whose logits are wanted, C width of the hidden states, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ollm_service.core.packing import BLOCK_TOKENS
from workers.runner.kv.cache import PackCache
from workers.runner.packed import attention
from workers.runner.packed.linear import in_pack
from workers.runner.packed.pack import Block, Pack


class PackedModel:
    """A model on a device that is attached to packs, which its layers compute in blocks of so many tokens.

    `visit` is called between two blocks.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        device: torch.device,
        block_tokens: int = BLOCK_TOKENS,
        visit: Callable[[], None] = lambda: None,
    ) -> None:
        self._module = module
        self._device = device
        self._block_tokens = block_tokens
        self._visit = visit
        self._running: _Running | None = None

    @contextmanager
    def attached(self, layers: list[nn.Module]) -> Iterator[None]:
        """Run in packs as long as this lasts; then the model is as it was."""
        config: Any = self._module.config.get_text_config(decoder=True)
        before = config._attn_implementation
        changed: list[tuple[nn.Module, Any]] = []
        try:
            config._attn_implementation = attention.NAME
            for layer in layers:
                changed.append((layer, layer.__dict__.get("forward")))
                _set_forward(layer, self._in_blocks(layer.forward))
            for child in self._module.modules():
                if hasattr(child, "in_proj_qkvz"):
                    changed.append((child, child.__dict__.get("forward")))
                    _set_forward(child, in_pack(child.forward, child))
            yield
        finally:
            config._attn_implementation = before
            for module, forward in changed:
                _set_forward(module, forward)

    def logits(self, pack: Pack, cache: PackCache, features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits [M, V] of the wanted places. Raises OSError, StopRequested, and whatever a model raises.

        `features` are the images and sounds of the pack's prompts, in their order.
        """
        blocks = pack.blocks(self._block_tokens)
        self._running = _Running(blocks, cache)
        cache.block = blocks[0]
        try:
            output = self._module(
                input_ids=pack.tokens_N().unsqueeze(0).to(self._device),
                position_ids=pack.positions_N().unsqueeze(0).to(self._device),
                attention_mask=None,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=pack.wanted_M().to(self._device),
                pack_cache=cache,
                **(features or {}),
            )
        finally:
            self._running = None
        logits_MV: Tensor = output.logits[0]
        return logits_MV

    def _in_blocks(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward that takes hidden states [1, N, C] a block at a time."""

        def run(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
            running = self._running
            assert running is not None, "a model that is attached to packs was run without one"
            if len(running.blocks) == 1:
                return forward(hidden, *arguments, **options)
            output, is_tuple = torch.empty_like(hidden), False
            for block in running.blocks:
                self._visit()
                running.cache.block = block
                found = forward(*_part((hidden, *arguments), block, hidden.shape[1]), **_part(options, block, hidden.shape[1]))
                is_tuple = isinstance(found, tuple)
                output[:, block.begin : block.end] = found[0] if is_tuple else found
            return (output,) if is_tuple else output

        return run


class _Running:
    """The pass that is under way."""

    def __init__(self, blocks: list[Block], cache: PackCache) -> None:
        self.blocks = blocks
        self.cache = cache


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Have the instance's forward be this one, None: its class's. Its hooks stay around it."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def _part(value: Any, block: Block, tokens: int) -> Any:
    """What belongs to the block of whatever has an entry for each of the pack's tokens in its second dimension."""
    if isinstance(value, Tensor):
        return value[:, block.begin : block.end] if value.ndim > 1 and value.shape[1] == tokens else value
    if type(value) is tuple:
        return tuple(_part(one, block, tokens) for one in value)
    if type(value) is dict:
        return {name: _part(one, block, tokens) for name, one in value.items()}
    return value
