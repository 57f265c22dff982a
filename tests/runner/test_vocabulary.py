"""Does a model answer the same whose embedding is looked up on disk, and whose head comes in tiles?"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from ollm_service.core.passes import Applied
from ollm_service.core.passing import TILE_BYTES, tile_rows
from ollm_service.core.plan import PassId
from ollm_service.core.wire import AttemptFailed, Execute, Finished, Loaded
from tests.runner.commands import answers, first_outcomes, make_command, only, results_of, run, work_row
from tests.runner.models import plain_greedy
from tests.runner.test_weights import ORIGIN, flip_a_bit, nothing, weights_folder
from workers.runner.backends import generic
from workers.runner.engine import Engine
from workers.runner.raw import pages
from workers.runner.weights.extents import ALIGNMENT, ExtentFile, ExtentWriter
from workers.runner.weights.streaming import LayerStream
from workers.runner.weights.vocabulary import RowsFromDisk, TiledHead

OFFLOAD, ROUTING = PassId.CPU_OFFLOAD, PassId.MOE_ROUTING
PROMPTS = ["one two", "a somewhat longer prompt, so that rows are padded", "3"]
NEW_TOKENS = 8


def command(model: Path, cache: Path, layers: tuple[int, ...], *, on_disk: bool = True) -> Execute:
    """Answer the prompts with these layers coming from disk, and the vocabulary."""
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    passes = (OFFLOAD, ROUTING)
    return make_command(
        model, rows, passes=passes, cache_dir=cache, disk_layers=layers, vocabulary_on_disk=on_disk, micro_batch=3
    )


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", (0, 1)),
        ("llama", (1,)),
        ("gpt2", (0, 1)),
        ("gemma3", (1, 2)),
        ("qwen3-moe", (0, 1, 2, 3)),
        ("gpt-oss", (2,)),
    ],
)
def test_a_vocabulary_on_disk_keeps_the_tokens(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path, family: str, layers: tuple[int, ...]
) -> None:
    """Heads of their own and tied ones, scaled embeddings, with positions or without: the tokens are those of transformers."""
    model = families(family)
    messages = run(engine, command(model, tmp_path, layers))
    found = {row: result.text for row, result in results_of(messages).items()}
    assert found == {index: plain_greedy(model, prompt, NEW_TOKENS) for index, prompt in enumerate(PROMPTS)}
    outcome, measured = first_outcomes(messages)[OFFLOAD], only(messages, Finished).measured
    assert isinstance(outcome, Applied)
    rows, tiles = measured["vocabulary_rows_read"], measured["head_tiles_brought"]
    assert re.search(r"; vocabulary from disk: \d+ rows looked up, \d+ tiles of the head$", outcome.evidence)
    assert tiles == measured["passes"]
    assert len(set("".join(PROMPTS))) <= rows <= len(set("".join(PROMPTS))) + 3 + len(PROMPTS) * NEW_TOKENS


def test_the_vocabulary_stays_for_another_placement(families: Callable[[str], Path], tmp_path: Path) -> None:
    """A warm model whose embedding is on disk is loaded anew for a placement that keeps it, and answers the same."""
    engine, model = Engine(), families("llama")
    runs = [run(engine, command(model, tmp_path, (0, 1), on_disk=on_disk)) for on_disk in (True, True, False)]
    assert [only(messages, Loaded).was_warm for messages in runs] == [False, True, False]
    assert results_of(runs[0]) == results_of(runs[1]) == results_of(runs[2])
    assert "vocabulary_rows_read" not in only(runs[2], Finished).measured


def test_nothing_of_the_vocabulary_is_in_memory(families: Callable[[str], Path], tmp_path: Path) -> None:
    """Embedding and head are on the meta device, one of them for both where they are tied."""
    for family in ("llama", "gpt2"):
        module = generic.load(command(families(family), tmp_path, (0, 1)), nothing).module
        ends = [child for child in module.modules() if isinstance(child, RowsFromDisk | TiledHead)]
        assert len(ends) == 2
        assert all(end.inner.weight.is_meta for end in ends)


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_head_gets_plain_strides(families: Callable[[str], Path], tmp_path: Path, on_disk: bool) -> None:
    """Also of a lone row: a slice's strides make torch copy the vocabulary matrix for a product in half precision."""
    order = command(families("llama"), tmp_path, (0, 1), on_disk=on_disk)
    order = order if on_disk else replace(order, placement=replace(order.placement, disk_layers=()))
    loaded = generic.load(order, nothing)
    head, seen = loaded.module.get_output_embeddings(), []  # type: ignore[no-untyped-call]  # transformers does not annotate it
    head.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].stride()))
    if loaded.stream is not None:
        loaded.stream.open()
    try:
        with torch.inference_mode():
            loaded.module(input_ids=torch.tensor([[5, 6, 7]]), logits_to_keep=1)
    finally:
        if loaded.stream is not None:
            loaded.stream.close()
    width = loaded.module.config.hidden_size
    assert seen == [(width, width, 1)]


def test_a_damaged_embedding_is_made_again_when_it_is_loaded(families: Callable[[str], Path], tmp_path: Path) -> None:
    """Single rows have no checksum: all are read once while loading, and the weights are laid out anew where one is wrong."""
    order = command(families("llama"), tmp_path, (0, 1))
    right = answers(Engine(), order)
    flip_a_bit(weights_folder(order), at=ALIGNMENT + 200)  # the extent of what is in no layer is one block
    assert answers(Engine(), order) == right


def test_a_damaged_head_ends_the_attempt_and_not_the_next(families: Callable[[str], Path], tmp_path: Path) -> None:
    """A tile with a wrong bit: no row is answered with it, and the next attempt lays the weights out again."""
    order = command(families("llama"), tmp_path, (0, 1))
    engine = Engine()
    right = answers(engine, order)
    source = generic.load(order, nothing).stream
    assert source is not None
    flip_a_bit(weights_folder(order), at=source.source.slices["lm_head.weight"][0].offset + 5)
    engine = Engine()
    failed = only(run(engine, order), AttemptFailed)
    assert (failed.code, failed.stage) == ("weights_corrupt", "generating")
    assert answers(engine, order) == right


# ---------------------------------------------------------------------------------------- several tiles


ROWS, WIDTH = 700, 24  # 24 floats are 96 bytes: a tile of whole blocks has a multiple of 128 rows


def written_matrix(folder: Path, tile: int) -> tuple[ExtentFile, torch.Tensor]:
    """A vocabulary matrix in tiles of so many rows, and what it holds."""
    matrix = torch.randn(ROWS, WIDTH)
    writer = ExtentWriter(folder, ORIGIN)
    for number, first in enumerate(range(0, ROWS, tile)):
        writer.append(f"embed/{number}", [("embed", matrix[first : first + tile])], nothing, first)
    writer.finish()
    writer.close()
    return ExtentFile(folder, ORIGIN), matrix


@pytest.mark.parametrize("rows", [[0], [ROWS - 1], [0, 1, 2], [3, 127, 128, 129, 500], list(range(ROWS)), []])
def test_rows_come_back_bit_by_bit(tmp_path: Path, rows: list[int]) -> None:
    """Rows at the edges of blocks and tiles, neighbours and lone ones, all of them, none."""
    source, matrix = written_matrix(tmp_path, 256)
    held = pages(len(rows) * WIDTH * 4)
    source.read_rows(source.slices["embed"], rows, held)
    found = held[: len(rows) * WIDTH * 4].view(torch.float32).view(len(rows), WIDTH)
    assert torch.equal(found, matrix[rows])
    source.close()


def test_neighbouring_rows_are_read_together(tmp_path: Path) -> None:
    """Two rows of one block cost one block; all rows cost the matrix."""
    source, _matrix = written_matrix(tmp_path, 256)
    for rows, blocks in (([5, 7], 1), ([5, 600], 2), (list(range(ROWS)), 17)):
        before = source.bytes_read
        source.read_rows(source.slices["embed"], rows, pages(len(rows) * WIDTH * 4))
        assert source.bytes_read - before == blocks * ALIGNMENT
    source.close()


def test_several_tiles_make_the_logits_of_one_head(tmp_path: Path) -> None:
    """Tile by tile, with a bias, for any leading dimensions, twice in a row; and an embedding with a padding row."""
    source, matrix = written_matrix(tmp_path, 256)
    stream = LayerStream([], source, torch.device("cpu"), {}, source.slices["embed"])
    plain = nn.Linear(WIDTH, ROWS)
    plain.weight = nn.Parameter(matrix)
    inner = nn.Linear(WIDTH, ROWS)
    inner.weight, inner.bias = nn.Parameter(torch.empty(ROWS, WIDTH, device="meta")), plain.bias
    head = TiledHead(inner, source.slices["embed"], stream)
    embedding = RowsFromDisk(nn.Embedding(ROWS, WIDTH, padding_idx=650, device="meta"), source.slices["embed"], stream)
    stream.open()
    try:
        with torch.inference_mode():
            for shape in ((2, 3, WIDTH), (5, WIDTH)):
                hidden = torch.randn(*shape)
                torch.testing.assert_close(head(hidden), plain(hidden))
            tokens = torch.tensor([[650, 3, 3], [699, 0, 3]])
            assert torch.equal(embedding(tokens), functional.embedding(tokens, matrix))
            with pytest.raises(IndexError, match="vocabulary of 700"):
                embedding(torch.tensor([ROWS]))
    finally:
        stream.close()
    assert (stream.tiles_brought, stream.rows_looked_up) == (6, 4)


@pytest.mark.parametrize("row_bytes", [2, 96, 8192, 5762, 16382])
def test_tiles_are_of_whole_blocks(row_bytes: int) -> None:
    """So that one follows the other without padding; most are no larger than `TILE_BYTES`."""
    rows = tile_rows(row_bytes)
    assert rows * row_bytes % ALIGNMENT == 0
    assert rows * row_bytes <= TILE_BYTES or rows * row_bytes <= ALIGNMENT * row_bytes
