"""What is a model in memory, and how does one forward pass over a batch of rows go?

B rows, L new positions of each, T positions so far, V vocabulary.
"""

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from workers.runner.kv.cache import PackCache, layers_of
from workers.runner.prompts import ReadsMedia
from workers.runner.weights.streaming import LayerStream, layer_names


class CacheSource(Protocol):
    """Gives the KV cache of one attempt's rows, for as long as they run."""

    def __call__(self, *, rows: int, tokens: int) -> AbstractContextManager[PackCache]:
        """For so many rows at a time, of which none has more tokens than that at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKey:
    """Equal keys are the same weights in the same place, so that a warm model can serve another plan."""

    model_dir: str
    digest: str
    device_id: str
    host_layers: tuple[int, ...] = ()
    disk_layers: tuple[int, ...] = ()
    adapter_digest: str | None = None
    vocabulary_on_disk: bool = False
    reads_export: bool = False
    draft_digest: str | None = None


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A model of ours, with what is needed to run it. Passes change `module` and `open_cache`, and undo that again.

    `context_limit` is in tokens, prompt and answer together; None where the model sets none. `open_cache` gives the KV cache of
    rows that run in packs. `stream` brings the layers that are not kept on the device, if there are such. `draft` guesses
    tokens. `media` reads images and sounds, where a plan lets rows bring them. `feeds_itself`: only transformers' own
    `generate` knows how its forward pass is fed.
    """

    key: ModelKey
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    context_limit: int | None
    end_tokens: frozenset[int]
    pad_token: int
    open_cache: CacheSource
    stream: LayerStream | None = None
    draft: PreTrainedModel | None = None
    media: ReadsMedia | None = None
    feeds_itself: bool = False
    _accepted: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self._accepted = frozenset(inspect.signature(self.module.forward).parameters)

    def next_logits(self, tokens_BL: Tensor, mask_BT: Tensor, positions_BL: Tensor, cache: Cache) -> Tensor:
        """Logits [B, V] of the token that follows the last position. Left-padded; padding is 0 in the mask."""
        offered: dict[str, Any] = {"position_ids": positions_BL, "logits_to_keep": 1}
        extra = {name: value for name, value in offered.items() if name in self._accepted}
        output = self.module(input_ids=tokens_BL, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **extra)
        logits_BV: Tensor = output.logits[:, -1, :]
        return logits_BV

    @property
    def is_broken(self) -> bool:
        """Whether weights that it needs could not be read."""
        return self.stream is not None and self.stream.is_broken

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads the prompt, so that the answer alone has the decoder's positions."""
        return bool(getattr(self.module.config, "is_encoder_decoder", False))

    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return [self.module.get_submodule(name) for name in layer_names(self.module)]


def resident_cache(module: PreTrainedModel) -> CacheSource:
    """A KV cache that stays on the device."""

    @contextmanager
    def opened(*, rows: int, tokens: int) -> Iterator[PackCache]:  # noqa: ARG001 - each row brings its own room
        cache = PackCache(layers_of(module))
        try:
            yield cache
        finally:
            cache.close()

    return opened


def free_memory() -> None:
    """Free what nobody refers to any more, and what torch's allocator keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def at_each_layer(model: LoadedModel, visit: Callable[[], None]) -> Iterator[None]:
    """Call `visit` after every layer of every forward pass: of the decoder, an encoder, and towers of images and sounds."""

    def visited(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        visit()

    others = [part for part in model.module.modules() if isinstance(part, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_hook(visited) for layer in dict.fromkeys([*model.layers(), *others])]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
