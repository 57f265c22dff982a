"""disk-cache: the KV cache lives in files of our own, in a private folder that is deleted at the end of the attempt."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ollm_service.core.layout import USUAL_WINDOW_TOKENS
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.pack_memory import kv_file_bytes
from ollm_service.core.packing import runs_in_packs
from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from workers.runner.interruptions import PassFailed
from workers.runner.kv.cache import PackCache
from workers.runner.kv.files import free_bytes
from workers.runner.kv.folder import PrivateFolder, delete_orphans
from workers.runner.kv.quantized import Int8
from workers.runner.kv.strategy import FileStrategy, cache_in_files, has_history
from workers.runner.kv.traffic import Traffic
from workers.runner.model import LoadedModel


class DiskCache:
    """The pass. Evidence: the bytes that real forward passes wrote, and what the strategy made of them."""

    pass_id = PassId.DISK_CACHE

    def __init__(self, model: LoadedModel, command: Execute) -> None:
        self._model = model
        self._placement = command.placement
        self._profile = command.profile
        self._strategy = _strategy_of(command.placement.kv_cache_strategy, command.config)
        self._cache_dir = None if command.cache_dir is None else Path(command.cache_dir)
        self._resident = model.open_cache
        self._folder: PrivateFolder | None = None
        self._runs_in_packs = runs_in_packs(model.module.config.model_type, command.runtime_plan.backend_id)
        self._traffic = Traffic()

    def check(self) -> PassOutcome | None:
        """Not needed where the placement keeps the cache in memory; fails without a folder, or for a model without history."""
        if self._strategy is None:
            why = self._placement.kv_details.get("strategy_selector_reason", "so placed")
            return NotNeeded(reason=f"the KV cache stays in memory: {why}")
        if self._cache_dir is None:
            return Failed(reason="this worker has no cache folder", error_type="NoCacheFolder")
        if not self._runs_in_packs:
            return Failed(reason="the model's attention cannot read from files", error_type="NotPacked")
        if not has_history(self._model.module):
            return Failed(reason="no layer of the model keeps a full history", error_type="NothingToPage")
        return None

    def apply(self) -> None:
        """Make the private folder; from now on the cache lives in it."""
        assert self._cache_dir is not None
        try:
            delete_orphans(self._cache_dir)
            self._folder = PrivateFolder(self._cache_dir)
        except OSError as error:
            raise self._failed("no private cache folder can be made", error) from error
        self._model.open_cache = self._opened

    def evidence(self) -> PassOutcome:
        """Applied with what the strategy says; failed where nothing was written."""
        assert self._strategy is not None
        if self._traffic.bytes_written == 0:
            return Failed(reason="no forward pass wrote to the cache folder", error_type="NoEvidence")
        return Applied(evidence=self._strategy.evidence(self._traffic))

    def undo(self) -> None:
        """Give the model its resident cache back and delete the folder."""
        self._model.open_cache = self._resident
        if self._folder is not None:
            self._folder.delete()
            self._folder = None

    def measured(self) -> Mapping[str, float]:
        """Bytes written and read back, and what the strategy counts besides."""
        assert self._strategy is not None
        moved = {"kv_bytes_written": float(self._traffic.bytes_written), "kv_bytes_read": float(self._traffic.bytes_read)}
        return {**moved, **self._strategy.measured(self._traffic)}

    @contextmanager
    def _opened(self, *, rows: int, tokens: int) -> Iterator[PackCache]:
        assert self._folder is not None
        assert self._strategy is not None
        window = self._strategy.window or tokens
        most = kv_file_bytes(self._profile, self._placement.kv_cache_strategy, rows=rows, tokens=tokens, window_tokens=window)
        try:
            self._check_room(self._folder.path, most)
            with cache_in_files(
                self._model.module,
                self._strategy,
                self._folder.path,
                self._traffic,
                rows=rows,
                tokens=tokens,
                reserved_bytes=most,
            ) as cache:
                yield cache
        except OSError as error:
            raise self._failed("the KV cache cannot be written or read back", error) from error

    def _check_room(self, folder: Path, most: int) -> None:
        free = free_bytes(folder)
        if most > free:
            what = f"No space left for the KV cache: its files may take {most:,} bytes, and {free:,} are free"
            raise PassFailed(self.pass_id, what, "NoRoomForCache")

    def _failed(self, what: str, error: OSError) -> PassFailed:
        return PassFailed(self.pass_id, f"{what}: {error.strerror or error}", type(error).__name__)


def _strategy_of(strategy: KVCacheStrategy, config: RuntimeConfig) -> FileStrategy | None:
    """How the files are kept; None: there are none."""
    match strategy:
        case KVCacheStrategy.RESIDENT:
            return None
        case KVCacheStrategy.PAGED:
            return FileStrategy()
        case KVCacheStrategy.QUANTIZED_COLD_TIER:
            return FileStrategy(encoding=Int8())
        case KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER:
            return FileStrategy(window=config.kv_cache_window_tokens or USUAL_WINDOW_TOKENS)
