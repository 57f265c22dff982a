"""How does a model do without its vocabulary matrices in memory? Rows of the embedding are read, tiles of the head pass through.

Around both stays what transformers has there: a scale of the embedding, a bias of the head, whatever a model does with logits.

V vocabulary, H hidden size, U different tokens of a forward pass, R rows of a tile, `_X` any leading dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from workers.runner.raw import pages
from workers.runner.weights.extents import CorruptExtents, Extent, ExtentFile
from workers.runner.weights.parts import input_embedding, output_head
from workers.runner.weights.streaming import LayerStream, on_device


class RowsFromDisk(nn.Module):
    """Takes an embedding's place, and gives it a table of just the rows that a forward pass asks for."""

    def __init__(self, inner: nn.Embedding, slices: Sequence[Extent], stream: LayerStream) -> None:
        super().__init__()
        inner.padding_idx = None  # it only says which row is not to be trained, and would be looked for in the small table
        self.inner = inner
        self._slices = slices
        self._stream = stream
        self._absent = inner._parameters["weight"]

    def forward(self, tokens_X: Tensor) -> Tensor:
        """What the embedding makes of tokens: [..., H]. Raises IndexError for a token that is none, and what reading raised."""
        unique_U, places_X = torch.unique(tokens_X, return_inverse=True)
        table_UH = on_device(self._read(unique_U.tolist()), self._stream.device)
        self.inner._parameters["weight"] = nn.Parameter(table_UH, requires_grad=False)
        try:
            vectors_XH: Tensor = self.inner(places_X)
        finally:
            self.inner._parameters["weight"] = self._absent
        return vectors_XH

    def _read(self, rows: Sequence[int]) -> Tensor:
        span, count = self._slices[0].spans[0], sum(extent.spans[0].shape[0] for extent in self._slices)
        if rows and not 0 <= rows[0] <= rows[-1] < count:
            raise IndexError(f"a token is not in the vocabulary of {count:,}")
        held = pages(len(rows) * (span.size // span.shape[0]))
        try:
            self._stream.source.read_rows(self._slices, rows, held)
        except (CorruptExtents, OSError) as error:
            raise self._stream.ended(error) from error
        self._stream.rows_looked_up += len(rows)
        return held[: len(rows) * (span.size // span.shape[0])].view(getattr(torch, span.dtype)).view(len(rows), *span.shape[1:])


class TiledHead(nn.Module):
    """Takes the output head's place: logits of one tile of the vocabulary after the other, as the stream brings them."""

    def __init__(self, inner: nn.Linear, slices: Sequence[Extent], stream: LayerStream) -> None:
        super().__init__()
        self.inner = inner
        self._slices = slices
        self._stream = stream

    def forward(self, hidden_XH: Tensor) -> Tensor:
        """Logits [..., V]. Raises what reading raised."""
        hidden_XH = hidden_XH.clone(memory_format=torch.contiguous_format)  # for strided ones torch copies the tile
        count = sum(extent.spans[0].shape[0] for extent in self._slices)
        logits_XV = hidden_XH.new_empty((*hidden_XH.shape[:-1], count))
        bias_V = self.inner._parameters["bias"]
        for extent in self._slices:
            first = extent.first or 0
            last = first + extent.spans[0].shape[0]
            with self._stream.tile(extent) as rows_RH:
                bias_R = None if bias_V is None else bias_V[first:last]
                logits_XV[..., first:last] = functional.linear(hidden_XH, rows_RH, bias_R)
        return logits_XV


def head_tiles(module: PreTrainedModel, source: ExtentFile) -> tuple[Extent, ...]:
    """The tiles of the output head; a tied one's are those of the embedding. Raises ValueError where it is no linear map."""
    head, embedding = output_head(module), input_embedding(module)
    if head is None or embedding is None:
        raise ValueError("the model has no plain embedding and head that could stay on disk")
    return source.slices[_key_of(module, head.weight)]


def leave_on_disk(module: PreTrainedModel, stream: LayerStream) -> None:
    """Put modules in the places of embedding and head that do without their matrices. All rows are read once, to be checked.

    Raises CorruptExtents and OSError.
    """
    embedding, head = input_embedding(module), output_head(module)
    assert embedding is not None
    assert head is not None
    slices, tiles = stream.source.slices[_key_of(module, embedding.weight)], head_tiles(module, stream.source)
    scratch = pages(max(extent.size for extent in slices))
    for extent in slices:
        stream.source.read(extent.name, scratch)
    _replace(module, head, TiledHead(head, tiles, stream))
    _replace(module, embedding, RowsFromDisk(embedding, slices, stream))


def _key_of(module: PreTrainedModel, weight: Tensor) -> str:
    return next(key for key, parameter in module.named_parameters() if parameter is weight)


def _replace(root: nn.Module, child: nn.Module, replacement: nn.Module) -> None:
    """Hang a module wherever another hangs."""
    for place in [name for name, module in root.named_modules(remove_duplicate=False) if module is child]:
        parent, _, name = place.rpartition(".")
        setattr(root.get_submodule(parent), name, replacement)
