"""mlp-chunking: the gated MLP runs over chunks of rows, so that its wide middle never exists for all rows at once.

Row = one position of one request; R rows of a forward pass, D model width. Each MLP computes every row by itself, so chunks give
the same numbers but for the rounding of differently shaped products.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ollm_service.core.packing import BLOCK_TOKENS
from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from workers.runner.memory import free_host_bytes
from workers.runner.model import LoadedModel

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
_MOST_ROWS = 16_384
_LEAST_RESERVE = 512 * 1024**2


class RowChunkedMlp(nn.Module):
    """Takes an MLP's place in its layer and feeds it at most `rows_limit()` rows at a time."""

    def __init__(self, inner: nn.Module, rows_limit: Callable[[], int], count: Callable[[int, int], None]) -> None:
        super().__init__()
        self.inner = inner
        self._rows_limit = rows_limit
        self._count = count

    def forward(self, hidden: Tensor) -> Tensor:
        """The inner MLP of `hidden` [..., D]."""
        hidden_RD = hidden.reshape(-1, hidden.shape[-1])
        chunks = torch.split(hidden_RD, self._rows_limit())
        self._count(hidden_RD.shape[0], len(chunks))
        if len(chunks) == 1:
            whole: Tensor = self.inner(hidden)
            return whole
        output_RD = torch.empty_like(hidden_RD)
        start = 0
        for chunk in chunks:
            output_RD[start : start + chunk.shape[0]] = self.inner(chunk)
            start += chunk.shape[0]
        return output_RD.reshape(hidden.shape)


class MlpChunking:
    """The pass. Evidence: the chunks into which real forward passes were split."""

    pass_id = PassId.MLP_CHUNKING

    def __init__(
        self, model: LoadedModel, command: Execute, free_bytes: Callable[[torch.device], int | None] | None = None
    ) -> None:
        """`free_bytes` says what a device has left; None: the system's own word."""
        details = command.runtime_plan.details
        self._model = model
        self._free_bytes = free_bytes or _free_bytes
        self._most_rows = int(details.get("mlp_chunking_max_rows", _MOST_ROWS))
        self._is_adaptive = details.get("mlp_chunking_mode") != "explicit-rows"
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._limit = self._most_rows
        self._largest_pass = 0
        self._smallest_limit = self._most_rows
        self._chunks = 0
        self._largest_chunk = 0

    def check(self) -> PassOutcome | None:
        """Fails for a model without a gated MLP."""
        if not self._places():
            return Failed(reason="the model has no gated MLP", error_type="NoGatedMlp")
        return None

    def apply(self) -> None:
        """Put a chunked MLP into each layer."""
        for index, (parent, name, inner) in enumerate(self._places()):
            # Free memory is asked for at the first MLP that a block of a forward pass meets.
            limit = self._fresh_limit if index == 0 else self._last_limit
            self._replaced.append((parent, name, inner))
            setattr(parent, name, RowChunkedMlp(inner, limit, self._count))

    def evidence(self) -> PassOutcome:
        """Applied with the number of chunks; not needed where one chunk held every forward pass."""
        if self._largest_pass == 0:
            return Failed(reason="no forward pass went through a chunked MLP", error_type="NoEvidence")
        if self._chunks == 0:
            return NotNeeded(
                reason=f"the largest forward pass had {self._largest_pass:,} rows, one chunk holds {self._smallest_limit:,}"
            )
        return Applied(evidence=f"{self._chunks:,} chunks of at most {self._largest_chunk:,} rows")

    def undo(self) -> None:
        """Put the model's own MLPs back."""
        while self._replaced:
            parent, name, inner = self._replaced.pop()
            setattr(parent, name, inner)

    def measured(self) -> Mapping[str, float]:
        """The chunks of split forward passes."""
        return {"mlp_chunks": float(self._chunks)}

    def _places(self) -> list[tuple[nn.Module, str, nn.Module]]:
        return [
            (parent, name, child)
            for parent in self._model.module.modules()
            for name, child in parent.named_children()
            if all(hasattr(child, part) for part in _PARTS)
        ]

    def _count(self, rows: int, chunks: int) -> None:
        self._largest_pass = max(self._largest_pass, rows)
        self._smallest_limit = min(self._smallest_limit, self._limit)
        if chunks > 1:
            self._chunks += chunks
            self._largest_chunk = max(self._largest_chunk, self._limit)

    def _last_limit(self) -> int:
        return self._limit

    def _fresh_limit(self) -> int:
        if self._is_adaptive:
            self._limit = min(self._most_rows, max(BLOCK_TOKENS, self._rows_that_fit()))
        return self._limit

    def _rows_that_fit(self) -> int:
        """Rows whose intermediates fit into free memory less a reserve: 512 MiB, or an eighth of what is free if that is more.

        Where memory is tight that says nothing of the rows of a block, for which the placement has made room.
        """
        free = self._free_bytes(self._model.device)
        if free is None:
            return self._most_rows
        _parent, _name, inner = self._replaced[0]
        up_weight = inner.get_parameter("up_proj.weight")
        intermediate, hidden = up_weight.shape
        bytes_per_row = (2 * hidden + 4 * intermediate) * up_weight.element_size()
        return int((free - max(_LEAST_RESERVE, free // 8)) // bytes_per_row)


def _free_bytes(device: torch.device) -> int | None:
    """On CUDA what the driver has left, and what torch's allocator holds without using it; else what the machine has."""
    if device.type != "cuda":
        return free_host_bytes()
    unused: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
