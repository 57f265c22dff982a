"""disk-cache: the KV cache lives in files of our own, in a private folder that is deleted at the end of the attempt."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from transformers import Cache

from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from workers.runner.interruptions import PassFailed
from workers.runner.kv.folder import PrivateFolder, delete_orphans
from workers.runner.kv.paged import can_be_paged, paged_cache
from workers.runner.kv.pages import Traffic
from workers.runner.model import LoadedModel


class DiskCache:
    """The pass. Evidence: the bytes that real forward passes wrote."""

    pass_id = PassId.DISK_CACHE

    def __init__(self, model: LoadedModel, command: Execute) -> None:
        self._model = model
        self._placement = command.placement
        self._cache_dir = None if command.cache_dir is None else Path(command.cache_dir)
        self._resident = model.open_cache
        self._folder: PrivateFolder | None = None
        self._micro_batches = 0
        self._traffic = Traffic()

    def check(self) -> PassOutcome | None:
        """Not needed where the placement keeps the cache in memory; fails without a folder, or for a model without history."""
        strategy = self._placement.kv_cache_strategy
        if strategy is KVCacheStrategy.RESIDENT:
            why = self._placement.kv_details.get("strategy_selector_reason", "so placed")
            return NotNeeded(reason=f"the KV cache stays in memory: {why}")
        if strategy is not KVCacheStrategy.PAGED:
            return Failed(reason=f"KV cache strategy `{strategy}` is not offered by this runner", error_type="UnknownStrategy")
        if self._cache_dir is None:
            return Failed(reason="this worker has no cache folder", error_type="NoCacheFolder")
        if not can_be_paged(self._model.module):
            return Failed(reason="no layer of the model keeps a full history", error_type="NothingToPage")
        return None

    def apply(self) -> None:
        """Make the private folder; from now on each micro-batch's cache lives in it."""
        assert self._cache_dir is not None
        try:
            delete_orphans(self._cache_dir)
            self._folder = PrivateFolder(self._cache_dir)
        except OSError as error:
            raise self._failed("no private cache folder can be made", error) from error
        self._model.open_cache = self._opened

    def evidence(self) -> PassOutcome:
        """Applied with the bytes written; failed where none were."""
        traffic = self._traffic
        if traffic.bytes_written == 0:
            return Failed(reason="no forward pass wrote to the cache folder", error_type="NoEvidence")
        return Applied(evidence=f"{traffic.bytes_written:,} bytes written in {traffic.pages_written:,} pages")

    def undo(self) -> None:
        """Give the model its resident cache back and delete the folder."""
        self._model.open_cache = self._resident
        if self._folder is not None:
            self._folder.delete()
            self._folder = None

    def measured(self) -> Mapping[str, float]:
        """Bytes written and read back."""
        return {
            "kv_bytes_written": float(self._traffic.bytes_written),
            "kv_bytes_read": float(self._traffic.bytes_read),
            "kv_pages_written": float(self._traffic.pages_written),
        }

    @contextmanager
    def _opened(self) -> Iterator[Cache]:
        assert self._folder is not None
        self._micro_batches += 1
        path: Path | None = None
        try:
            path = self._folder.subfolder(f"batch-{self._micro_batches:06d}")
            with paged_cache(self._model.module, path, self._traffic) as cache:
                yield cache
        except OSError as error:
            raise self._failed("the KV cache cannot be written or read back", error) from error
        finally:
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)

    def _failed(self, what: str, error: OSError) -> PassFailed:
        return PassFailed(self.pass_id, f"{what}: {error.strerror or error}", type(error).__name__)
