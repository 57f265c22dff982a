"""attention-replacement: attention whose memory grows with the history and not with its square, for models that lack it.

transformers computes all scores of such a model at once, since its fused functions know neither sinks nor caps. In packs our own
function takes their place, which computes a bounded number of scores at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ollm_service.core.packing import EAGER_MODELS, runs_in_packs
from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from workers.runner.kv.cache import PackCache
from workers.runner.model import LoadedModel


class AttentionReplacement:
    """The pass. Evidence: how often real forward passes have called our function, in all layers."""

    pass_id = PassId.ATTENTION_REPLACEMENT

    def __init__(self, model: LoadedModel, command: Execute) -> None:
        self._model = model
        self._kind = model.module.config.model_type
        self._backend_id = command.runtime_plan.backend_id
        self._own_source = model.open_cache
        self._caches: list[PackCache] = []

    def check(self) -> PassOutcome | None:
        """Not needed where transformers' own attention is linear in memory; fails for a model that cannot run in packs."""
        if self._kind not in EAGER_MODELS:
            return NotNeeded(reason="transformers' own attention of this model computes no more scores at a time than it needs")
        if not runs_in_packs(self._kind, self._backend_id):
            return Failed(reason="the model's attention cannot be chosen", error_type="NotPacked")
        return None

    def apply(self) -> None:
        """Count what the attention function is asked for."""
        self._own_source = self._model.open_cache
        self._model.open_cache = self._opened

    def evidence(self) -> PassOutcome:
        """Applied with the number of calls; failed where there was none."""
        if not self._calls:
            return Failed(reason="no forward pass called the function", error_type="NoEvidence")
        return Applied(evidence=f"{self._calls:,} calls in place of transformers' attention, which computes all scores at once")

    def undo(self) -> None:
        """Count no more."""
        self._model.open_cache = self._own_source

    def measured(self) -> Mapping[str, float]:
        """The calls."""
        return {"attention_calls": float(self._calls)}

    @property
    def _calls(self) -> int:
        return sum(cache.attention_calls for cache in self._caches)

    @contextmanager
    def _opened(self, *, rows: int, tokens: int) -> Iterator[PackCache]:
        with self._own_source(rows=rows, tokens=tokens) as cache:
            self._caches.append(cache)
            yield cache
