"""How does a model run, as far as the memory that it needs depends on it?"""

from dataclasses import dataclass

from ollm_service.core.options import KVCacheStrategy

USUAL_WINDOW_TOKENS = 256
# Keys and values go to files a page at a time; until then the newest tokens of all rows are in memory, so many bytes in a layer.
PAGE_TOKENS, MOST_TAIL_BYTES = 128, 8 * 1024**2
IN_FILES = frozenset(KVCacheStrategy) - {KVCacheStrategy.RESIDENT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model runs, as far as memory depends on it.

    `device_kind` is `cpu`, `cuda` or `mps`; the layers that `host_layers` and `disk_layers` name pass through the device.
    `window_tokens` bounds a KV cache in a ring. `mlp_rows` are the positions that the feed-forward network computes at a time,
    None: all. `is_sampled`: some row may draw its tokens. `is_routed`: layers pass without their experts. `vocabulary_on_disk`:
    embedding and head do not stay, either; some layer has to come from disk then. `is_packed`: rows share a pack.
    `may_share`: there may be other rows, before or beside, that begin with the same tokens. `lays_out`: layers leave, and the
    weights do not lie on the cache disk by layers yet.
    """

    device_kind: str = "cpu"
    kv: KVCacheStrategy = KVCacheStrategy.RESIDENT
    window_tokens: int = USUAL_WINDOW_TOKENS
    mlp_rows: int | None = None
    is_sampled: bool = True
    host_layers: tuple[int, ...] = ()
    disk_layers: tuple[int, ...] = ()
    is_routed: bool = False
    vocabulary_on_disk: bool = False
    is_packed: bool = False
    may_share: bool = True
    lays_out: bool = False

    @property
    def shares_beginnings(self) -> bool:
        """Whether rows may attend to a beginning that is kept once: where every token of it is kept as it was."""
        return self.is_packed and self.may_share and self.kv in (KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED)
