"""How do rows with images and sounds go through packs: which come first, what is not cut, and which tokens see ahead?"""

import pytest
import torch

from ollm_service.core.options import GenerationConfig
from workers.runner.packed.attention import Rule, seeing_ahead
from workers.runner.packed.pack import Pack, TokenSequence
from workers.runner.packed.waiting import WaitingRows
from workers.runner.prompts import EncodedRow, media_of

HEADS, KEY_HEADS, WIDTH, TOKENS = 4, 2, 8, 50
SPANS = ((3, 9), (20, 45))


def encoded(row: int, marks: list[int] | None = None, max_new_tokens: int = 5) -> EncodedRow:
    """A row of 40 equal tokens; with marks it has an image where they are 1."""
    tensors = {} if marks is None else {"token_type_ids": torch.tensor([marks]), "pixel_values": torch.zeros(1, 3, 2, 2)}
    return EncodedRow(
        row=row,
        tokens=(7,) * 40,
        generation=GenerationConfig(),
        max_new_tokens=max_new_tokens,
        is_clamped=False,
        media=media_of(tensors, lambda: tensors),
    )


@pytest.mark.parametrize("window", [None, 4, 16, 100])
def test_tokens_of_an_image_see_each_other(window: int | None) -> None:
    """All scores at once, in float64, give the same: what came before, and the own image, as far as the window reaches."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, TOKENS, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    found = seeing_ahead(query, key, value, Rule(scale=0.3, window=window), SPANS)
    keys, values = (part.double().repeat_interleave(HEADS // KEY_HEADS, dim=0) for part in (key, value))
    scores = query.double() @ keys.transpose(1, 2) * 0.3
    for mine in range(TOKENS):
        for other in range(TOKENS):
            is_together = any(begin <= mine < end and begin <= other < end for begin, end in SPANS)
            is_seen = (other <= mine or is_together) and mine - other < (window or TOKENS)
            if not is_seen:
                scores[:, mine, other] = -torch.inf
    expected = scores.softmax(dim=-1) @ values
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_prompt_with_an_image_is_not_cut() -> None:
    """A block that ended inside an image would let half of it see the other half only; all else is in blocks as ever."""
    plain, other = (TokenSequence(tokens=[1] * 30, capacity=40) for _ in range(2))
    seeing, short = (TokenSequence(tokens=[1] * length, capacity=40, spans=((2, 9),)) for length in (30, 10))
    pack = Pack()
    for sequence in (plain, seeing, short, other):
        pack.add(sequence, wanted=1, is_prompt=True)
    assert [(block.begin, block.end) for block in pack.blocks(16)] == [(0, 16), (16, 30), (30, 60), (60, 76), (76, 92), (92, 100)]
    assert [len(block.segments) for block in pack.blocks(16)] == [1, 1, 1, 2, 1, 1]
    seeing.cached = 29
    later = Pack()
    later.add(seeing, wanted=1, is_prompt=False)
    assert [(block.begin, block.end) for block in later.blocks(16)] == [(0, 1)]


def test_rows_with_media_come_first_and_share_nothing() -> None:
    """Equal tokens stand for different images, so that only rows of text share a beginning."""
    marks = [0] * 10 + [1] * 4 + [0] * 26
    rows = [encoded(0, max_new_tokens=9), encoded(1), encoded(2, marks), encoded(3, marks, max_new_tokens=2)]
    taken = WaitingRows(rows).take(4, 10_000, others_run=False)
    assert [waiting.row.row for waiting in taken] == [2, 3, 0, 1]
    assert [waiting.beginning is None for waiting in taken] == [True, True, False, False]


@pytest.mark.parametrize(
    ("marks", "spans"),
    [([0, 0, 0], ()), ([1, 1, 0], ((0, 2),)), ([0, 1, 0, 1, 1], ((1, 2), (3, 5)))],
)
def test_images_are_found_where_they_are_marked(marks: list[int], spans: tuple[tuple[int, int], ...]) -> None:
    """Each run of marks is one image."""
    media = encoded(0, marks).media
    assert media is not None
    assert media.spans == spans
