"""What is a KV cache strategy that keeps files, and how does it become the cache of one attempt's rows?

A strategy gives each layer that would keep its full history a layer in files. Layers that are bounded by themselves (sliding
windows, recurrent states) stay in memory as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from workers.runner.kv.cache import PackCache, layers_of
from workers.runner.kv.layer import HistoryLayer
from workers.runner.kv.paged import PagedLayer, SharedRoom
from workers.runner.kv.pages import Encoding, PageFile, Raw
from workers.runner.kv.quantized import Int8
from workers.runner.kv.traffic import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStrategy:
    """How keys and values are written, and of how many of the newest tokens, None: of all.

    `keeps_all`: what comes back is what was written, all of it.
    """

    encoding: Encoding = field(default_factory=Raw)
    window: int | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether attention sees every bit of every token."""
        return self.window is None and isinstance(self.encoding, Raw)

    def evidence(self, traffic: Traffic) -> str:
        """What it did, in words."""
        done = f"{traffic.bytes_written:,} bytes written in {traffic.pages_written:,} pages"
        if isinstance(self.encoding, Int8):
            return f"{done} of int8, for {traffic.bytes_before_encoding:,} bytes of keys and values"
        if self.window is not None:
            return f"{done}; the newest {self.window:,} tokens kept, {traffic.tokens_evicted:,} evicted in all layers"
        return done

    def measured(self, traffic: Traffic) -> Mapping[str, float]:
        """What it did, in numbers."""
        pages = {"kv_pages_written": float(traffic.pages_written)}
        return pages if self.window is None else {**pages, "kv_tokens_evicted": float(traffic.tokens_evicted)}


def has_history(module: PreTrainedModel) -> bool:
    """Whether the model has layers that keep their full history."""
    return any(type(layer) is DynamicLayer for layer in DynamicCache(config=module.config).layers)


@contextmanager
def cache_in_files(
    module: PreTrainedModel,
    strategy: FileStrategy,
    folder: Path,
    traffic: Traffic,
    *,
    rows: int,
    tokens: int,
    reserved_bytes: int = 0,
) -> Iterator[PackCache]:
    """The cache of at most `rows` rows of `tokens` tokens at a time, in `folder`, of whose disk so many bytes are reserved.

    Raises OSError without room.
    """
    made: list[HistoryLayer] = []
    shared_room = SharedRoom()

    def in_file(index: int, count: int) -> HistoryLayer:
        pages = PageFile(folder, index, traffic, strategy.encoding, -(-reserved_bytes // count))
        made.append(PagedLayer(pages, traffic, shared_room, rows=rows, tokens=tokens, window=strategy.window))
        return made[-1]

    try:
        yield PackCache(layers_of(module, in_file), keeps_all=strategy.keeps_all)
    finally:
        for layer in made:
            layer.close()
