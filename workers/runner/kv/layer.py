"""What is a cache layer that keeps files, to transformers and to us?"""

from abc import abstractmethod

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class FileLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers does not annotate it
    """In place of a layer that keeps its full history in memory. `rows` are those of the micro-batch, 0 before the first."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers does not annotate it
        self.rows = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first states tell how many rows there are."""
        super().lazy_initialization(key_states, value_states)
        self.rows = key_states.shape[0]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row that is named twice is there twice. Raises OSError."""
        if self.is_initialized:
            self.select_rows(indices)
            self.rows = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row so many times. Raises OSError."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Have these rows. Raises OSError."""
        self.batch_select_indices(beam_idx)

    @abstractmethod
    def select_rows(self, rows_B: Tensor) -> None:
        """Have these rows. Raises OSError."""

    @abstractmethod
    def close(self) -> None:
        """Close the files; deleting them is the folder's affair."""
