"""Which tokens may come next, told by a small model that reads the same tokens?

The draft stays in memory beside the model that it guesses for. It goes through its own packs, with all rows that want guesses
together: first over what is certain since it guessed last, then a token at a time. What it has guessed wrong is taken back from
its cache when it is asked again. It never decides a token.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ollm_service.core.packing import USUAL_GUESS_TOKENS
from workers.runner.kv.cache import PackCache, layers_of
from workers.runner.packed.attachment import PackedModel
from workers.runner.packed.pack import Pack, TokenSequence
from workers.runner.weights.streaming import layer_names

# How many more a text has room for when its own is full: with none all of it would be copied for each token.
_MORE_TOKENS = 128


class DraftModel:
    """A model that guesses for one attempt's rows, each known by a key."""

    def __init__(self, module: PreTrainedModel, device: torch.device, visit: Callable[[], None] = lambda: None) -> None:
        """`visit` is called before and inside each of its passes. Raises TypeError for layers that no cache can keep."""
        self._visit = visit
        self._packed = PackedModel(module, device, visit=visit)
        self._layers = [module.get_submodule(name) for name in layer_names(module)]
        self._cache = PackCache(layers_of(module))
        config = module.config.get_text_config(decoder=True)
        self._vocabulary: int = config.vocab_size
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        self._texts: dict[Hashable, TokenSequence] = {}

    @property
    def can_guess(self) -> bool:
        """Whether it can take back what was wrong."""
        return self._cache.can_go_back

    def can_read(self, text: Sequence[int]) -> bool:
        """Whether the text has room in its context, with guesses behind it, and all of the tokens places in its vocabulary.

        The same tokenizer says nothing of either: matrices may be padded, and a small model often has a short context.
        """
        has_room = self._context is None or len(text) + USUAL_GUESS_TOKENS <= self._context
        return has_room and max(text) < self._vocabulary

    @contextmanager
    def attached(self) -> Iterator[None]:
        """It can be asked as long as this lasts."""
        try:
            with self._packed.attached(self._layers):
                yield
        finally:
            self._cache.close()
            self._texts.clear()

    @torch.inference_mode()
    def guess(self, texts: Mapping[Hashable, Sequence[int]], most: int = USUAL_GUESS_TOKENS) -> dict[Hashable, list[int]]:
        """So many tokens that may follow each of these texts. Whatever the model raises passes through."""
        rows = {key: self._caught_up(key, text) for key, text in texts.items()}
        for _ in range(most if rows else 0):
            self._visit()
            pack = Pack()
            for row in rows.values():
                pack.add(row, wanted=1, is_prompt=not row.cached)
            best: list[int] = self._packed.logits(pack, self._cache).argmax(dim=-1).tolist()
            for row, token in zip(rows.values(), best, strict=True):
                row.cached = len(row.tokens)
                row.tokens.append(token)
        return {key: row.tokens[len(texts[key]) :] for key, row in rows.items()}

    def knows(self, key: Hashable) -> bool:
        """Whether it has read the text's beginning."""
        return key in self._texts

    def forget(self, key: Hashable) -> None:
        """This text ends."""
        text = self._texts.pop(key, None)
        if text is not None:
            self._cache.forget(text)

    def _caught_up(self, key: Hashable, text: Sequence[int]) -> TokenSequence:
        """The text as the cache has it, as far as that was right. The last token at least is to be fed in."""
        row = self._texts.get(key)
        if row is None:
            row = self._texts[key] = TokenSequence(tokens=[], capacity=0)
        if len(text) + USUAL_GUESS_TOKENS > row.capacity:
            row.capacity = len(text) + _MORE_TOKENS
        most = min(row.cached, len(text) - 1)
        right = next((place for place in range(most) if row.tokens[place] != text[place]), most)
        if right < row.cached:
            row.cached = right
            self._cache.truncate(row)
        row.tokens = list(text)
        return row
