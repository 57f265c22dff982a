"""What does a micro-batch need, part by part? Each part computed by hand for a model whose numbers are easy."""

from dataclasses import replace
from pathlib import Path

import pytest

from ollm_service.core import estimates
from ollm_service.core.estimates import (
    COMPILED_BYTES,
    TOKENIZER_BYTES,
    WORKSPACE_BYTES,
    MemoryEstimate,
    estimate_memory,
)
from ollm_service.core.layout import MOST_TAIL_BYTES, Layout
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.pack_memory import kv_file_bytes
from ollm_service.core.packing import BLOCK_TOKENS, MOST_CELLS, MOST_PACK_TOKENS, MOST_TRIED_IN_PASS, MOST_TRIED_TOKENS
from ollm_service.core.passing import BLOCK_BYTES, DEVICE_SLOTS, EXPERT_SLOTS, HOST_SLOTS, tile_bytes, vocabulary_bytes
from ollm_service.core.plan import GenericModelKind
from ollm_service.core.profile import ModelProfile
from ollm_service.core.working_memory import SAMPLER_BYTES
from tests.unit.core.samples import profile

LAYERS, HIDDEN, MIDDLE, WORDS, HEADS, HEAD = 4, 64, 256, 1000, 4, 16
QUERIES = HEADS * HEAD
KV = 2 * QUERIES * 4  # what a token leaves in one layer with as many key heads as query heads, in float32
LAYER = 500_000
# Float32, so that an element has 4 bytes; no sliding layer, no experts.
MODEL = profile(
    weight_bytes=LAYERS * LAYER + 512_000,
    layer_bytes=(LAYER,) * LAYERS,
    embedding_bytes=256_000,
    head_bytes=256_000,
    hidden_size=HIDDEN,
    intermediate_size=MIDDLE,
    vocabulary_size=WORDS,
    attention_heads=HEADS,
    attention_width=QUERIES,
    kv_bytes_per_token=LAYERS * KV,
    widest_kv_bytes_per_token=KV,
)
GREEDY = Layout(is_sampled=False)
CUDA = replace(GREEDY, device_kind="cuda")


def needs(model: ModelProfile = MODEL, layout: Layout = GREEDY, *, rows: int = 1, prompt: int, answer: int = 1) -> MemoryEstimate:
    """The estimate of rows that have a prompt and an answer of so many tokens."""
    return estimate_memory(model, layout, rows=rows, tokens=prompt + answer, prompt_tokens=prompt)


def test_the_prompt_of_many_rows() -> None:
    """3 rows of 100 tokens: their KV in all layers, the feed-forward network of one layer and its rotation, a mask of bytes."""
    positions = 3 * 100
    rotation = positions * 2 * HEAD * 4
    assert needs(rows=3, prompt=100) == MemoryEstimate(
        weights=LAYERS * LAYER + 512_000,
        kv=positions * LAYERS * KV,
        activations=positions * (4 * HIDDEN + 3 * MIDDLE) * 4 + rotation,
        logits=0,
        masks=3 * 100 * 100,
        workspace=WORKSPACE_BYTES["cpu"] + WORDS * TOKENIZER_BYTES,
        disk=0,
        host=0,
    )


def test_the_end_of_a_long_answer() -> None:
    """2 rows that end with 1,001 tokens: all their KV and half of a layer's again, one position's work, their logits."""
    found = needs(rows=2, prompt=1, answer=1000)
    assert found.kv == 2 * 1001 * LAYERS * KV + 2 * 1001 * KV // 2
    assert found.activations == 2 * (4 * HIDDEN + 3 * MIDDLE) * 4
    assert found.logits == 2 * WORDS * (4 + 1)
    assert found.masks == 0


def test_rows_that_sample_sort_copies() -> None:
    """Drawing a token sorts float32 copies of the logits: on the CPU beside the model, on CUDA in host memory."""
    sampled = replace(GREEDY, is_sampled=True)
    assert needs(layout=sampled, prompt=1, answer=1000).logits == WORDS * (4 + 1 + SAMPLER_BYTES)
    on_cuda = replace(CUDA, is_sampled=True)
    assert needs(layout=on_cuda, prompt=1).host - needs(layout=CUDA, prompt=1).host == WORDS * SAMPLER_BYTES


def test_an_element_counts_with_the_dtype() -> None:
    """In bfloat16 a position's work, and what sampling does not touch of its logits, take half."""
    half = replace(MODEL, dtype="bfloat16")
    assert needs(half, rows=2, prompt=100).activations * 2 == needs(rows=2, prompt=100).activations


def test_grouped_keys_take_their_part() -> None:
    """One key head for every four query heads keeps a quarter of the KV, and changes nothing else of the prompt's pass."""
    grouped = replace(MODEL, kv_bytes_per_token=LAYERS * KV // 4, widest_kv_bytes_per_token=KV // 4)
    many, few = needs(rows=8, prompt=200), needs(grouped, rows=8, prompt=200)
    assert few.kv * 4 == many.kv
    assert (few.activations, few.masks, few.weights) == (many.activations, many.masks, many.weights)


def test_sliding_layers_keep_their_window() -> None:
    """An answer far beyond the window grows by the KV of the layers of full attention alone."""
    sliding = replace(MODEL, kv_bytes_per_token=KV, sliding_kv_bytes_per_token=(LAYERS - 1) * KV, sliding_window=64)
    short, long = needs(sliding, prompt=10, answer=1000), needs(sliding, prompt=10, answer=2000)
    assert long.kv - short.kv == 1000 * KV + 1000 * KV // 2
    # While the prompt's pass lasts, sliding layers hold the whole prompt.
    assert needs(sliding, rows=8, prompt=500).kv == 8 * 500 * LAYERS * KV


def test_a_state_counts_once_a_row() -> None:
    """Layers without attention keep a state whose size does not depend on the tokens."""
    hybrid = replace(MODEL, state_bytes_per_row=1_000_000)
    for tokens in (10, 1000):
        assert needs(hybrid, rows=5, prompt=tokens).kv - needs(rows=5, prompt=tokens).kv == 5 * 1_000_000


def test_layers_of_linear_attention_compute_in_whole_chunks() -> None:
    """The gated delta rule pads a prompt to chunks of 64 positions: 65 tokens take as much of it as 128."""
    linear = replace(MODEL, linear_heads=8, linear_head_size=64)
    one, other = needs(linear, rows=2, prompt=65), needs(linear, rows=2, prompt=128)
    in_float32 = 2 * 128 * (11 * 8 * 64 + 3 * 64 * 8) * 4
    for found, positions in ((one, 2 * 65), (other, 2 * 128)):
        projected = positions * (3 * HIDDEN + 7 * 8 * 64) * 4
        assert found.activations == in_float32 + projected + positions * 2 * HEAD * 4


def test_experts_count_what_a_token_passes() -> None:
    """Of 8 experts of which a token passes 2, the copies for 2 count, and their width, never that of all 8."""
    mixture = replace(MODEL, model_type="qwen3_moe", expert_count=8, experts_per_token=2)
    found = needs(mixture, rows=3, prompt=100)
    routed = 2 * HIDDEN
    assert found.activations == 300 * (4 * HIDDEN + max(4 * routed, routed + 4 * MIDDLE)) * 4 + 300 * 2 * HEAD * 4
    assert needs(replace(mixture, expert_count=64), rows=3, prompt=100) == found


def test_models_without_fast_attention_compute_all_scores() -> None:
    """GPT-OSS computes the scores of all heads, three copies of them; its sliding layers do so, too."""
    eager = replace(MODEL, model_type="gpt_oss")
    assert needs(eager, prompt=2000).activations > 3 * HEADS * 2000 * 2000 * 4
    assert needs(prompt=2000).activations < HEADS * 2000 * 2000 * 4


def test_an_encoder_decoder_keeps_its_source() -> None:
    """The decoder keeps keys and values of its own tokens and of the source, and masks nothing of what it has not yet written."""
    pair = replace(MODEL, kind=GenericModelKind.SEQ2SEQ_LM, cross_kv_bytes_per_token=LAYERS * KV)
    assert needs(pair, rows=2, prompt=10, answer=1000).kv == 2 * (1010 * LAYERS * KV) + 2 * 1000 * KV // 2


def test_chunks_bound_the_feed_forward_network() -> None:
    """With mlp-chunking its width counts for a chunk; what the chunks make is as long as the prompt."""
    chunked = needs(layout=replace(GREEDY, mlp_rows=512), prompt=1000)
    assert chunked.activations == (1000 * 5 * HIDDEN + 512 * 3 * MIDDLE + 1000 * 2 * HEAD) * 4
    assert chunked.activations < needs(prompt=1000).activations


def test_a_padded_batch_needs_a_mask_and_a_lone_row_none() -> None:
    """SDPA skips the mask where no row is padded; a lone prompt that fills a window needs that of its sliding layers."""
    assert needs(prompt=100).masks == 0
    assert needs(rows=2, prompt=100).masks == 2 * 100 * 100
    sliding = replace(MODEL, sliding_kv_bytes_per_token=KV, sliding_window=100)
    assert (needs(sliding, prompt=99).masks, needs(sliding, prompt=100).masks) == (0, 100 * 100)


# --- rows that share packs


PACKED = replace(GREEDY, is_packed=True)
ALONE = replace(PACKED, may_share=False)
PAGED = replace(PACKED, kv=KVCacheStrategy.PAGED)
SCORES = 8  # bytes of one, in float32


def test_a_small_pack_is_computed_in_one_piece() -> None:
    """3 rows of 100 tokens: all their KV, what one layer makes of the pack, and scores of a beginning that they may share."""
    pack = 3 * 100
    found = needs(layout=PACKED, rows=3, prompt=100)
    scores = HEADS * pack * 100 * SCORES
    assert found.kv == 3 * 101 * LAYERS * KV
    assert found.activations == pack * (4 * HIDDEN + 3 * MIDDLE) * 4 + pack * 2 * HEAD * 4 + scores
    assert (found.masks, found.logits) == (0, 0)


def test_a_long_pack_is_computed_in_blocks() -> None:
    """Of 4,000 tokens a layer works on a block; embeddings, input and output are as long as the pack.

    That is not longer than prompts of one pass and the newest tokens of rows that have begun.
    """
    found = needs(layout=PACKED, rows=4, prompt=1000)
    scores = HEADS * BLOCK_TOKENS * 1000 * SCORES
    assert scores < MOST_CELLS * SCORES
    work = BLOCK_TOKENS * (4 * HIDDEN + 3 * MIDDLE) * 4
    assert found.activations == 4000 * (3 * HIDDEN + 2 * HEAD) * 4 + work + scores
    many = needs(layout=PACKED, rows=64, prompt=1000).activations
    assert many - scores - work == (MOST_PACK_TOKENS + MOST_TRIED_IN_PASS) * (3 * HIDDEN + 2 * HEAD) * 4


def test_a_prompt_of_several_blocks_needs_a_mask() -> None:
    """A block sees what came before it: at most so many cells at a time, and keys repeated for all heads."""
    assert needs(layout=PACKED, prompt=BLOCK_TOKENS).masks == 0
    assert needs(layout=PACKED, prompt=2000).masks == BLOCK_TOKENS * 2000 * 5 + 2 * 2000 * QUERIES * 4
    assert needs(layout=PACKED, prompt=50_000).masks == MOST_CELLS * 5 + 2 * 50_000 * QUERIES * 4


def test_tokens_that_are_tried_have_logits() -> None:
    """A lone row may have 16 places in a pass, many rows hardly more than themselves."""
    large = replace(MODEL, vocabulary_size=1_000_000)
    assert needs(large, PACKED, prompt=1).logits == (1 + MOST_TRIED_TOKENS) * 1_000_000 * 4
    assert needs(large, PACKED, rows=30, prompt=1).logits == MOST_TRIED_IN_PASS * 1_000_000 * 4
    assert needs(large, PACKED, rows=100, prompt=1).logits == 100 * 1_000_000 * 4


def test_sliding_layers_of_a_pack_keep_twice_their_window() -> None:
    """Before the window moves to the front; while a prompt is computed also a block."""
    sliding = replace(MODEL, kv_bytes_per_token=0, sliding_kv_bytes_per_token=LAYERS * KV, sliding_window=64)
    assert needs(sliding, ALONE, rows=2, prompt=10, answer=4000).kv == 2 * 128 * LAYERS * KV
    assert needs(sliding, ALONE, rows=2, prompt=5000).kv == 2 * (64 + BLOCK_TOKENS) * LAYERS * KV


def test_a_shared_beginning_has_a_window_and_states_of_its_own() -> None:
    """Beside those of its rows, where rows are longer than what they keep; also where they run one at a time."""
    bounded = replace(
        MODEL, kv_bytes_per_token=0, sliding_kv_bytes_per_token=LAYERS * KV, sliding_window=64, state_bytes_per_row=1000
    )
    assert needs(bounded, PACKED, rows=2, prompt=10, answer=4000).kv == 3 * 128 * LAYERS * KV + 3 * 1000
    assert needs(bounded, PACKED, prompt=10, answer=50).kv == 60 * LAYERS * KV + 2 * 1000
    alone, shared = needs(layout=ALONE, prompt=100).activations, needs(layout=PACKED, prompt=100).activations
    assert shared - alone == HEADS * 100 * 100 * SCORES


def test_more_rows_never_need_less_however_small_their_pages() -> None:
    """Pages are whole tokens, so that those of one row more may be half as large, and all of them less."""
    wide = replace(MODEL, kv_bytes_per_token=LAYERS * KV * 64, widest_kv_bytes_per_token=KV * 64)
    for kv in set(KVCacheStrategy) - {KVCacheStrategy.RESIDENT}:
        sizes = [needs(wide, replace(PACKED, kv=kv), rows=rows, prompt=100, answer=100).device_bytes for rows in range(1, 257)]
        assert sizes == sorted(sizes)


def test_kv_in_files_leaves_one_history_in_memory() -> None:
    """Of one row and one layer, with a page on its way, and the tails of all rows and layers."""
    found = needs(layout=PAGED, rows=2, prompt=1, answer=999)
    tails = 2 * (128 + MOST_TRIED_TOKENS + 1) * LAYERS * KV
    assert found.kv == (1000 + 128 + 128) * KV + tails
    assert found.disk == 2 * (1000 + 2 * 128) * LAYERS * KV
    wide = replace(MODEL, kv_bytes_per_token=LAYERS * KV * 1024, widest_kv_bytes_per_token=KV * 1024)
    page = MOST_TAIL_BYTES // (4 * KV * 1024)  # of four rows; of one it is four times as large
    kept = needs(wide, PAGED, rows=4, prompt=1, answer=999).kv
    assert kept == (1000 + 128 + 4 * page) * KV * 1024 + 4 * (page + MOST_TRIED_TOKENS + 1) * LAYERS * KV * 1024


def test_a_prompt_of_several_blocks_is_in_memory_for_one_layer() -> None:
    """Twice, as where one prompt ends in a block in which another begins."""
    found = needs(layout=PAGED, rows=2, prompt=3000)
    assert found.kv == (2 * 3000 + 128) * KV + 2 * (128 + MOST_TRIED_TOKENS + 1) * LAYERS * KV


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_quantized_files_take_a_byte_an_element(dtype: str, width: int) -> None:
    """int8 takes a byte for each element, and a float32 scale for what each head keeps of a token."""
    model = replace(MODEL, dtype=dtype)
    quantized = replace(PACKED, kv=KVCacheStrategy.QUANTIZED_COLD_TIER)
    elements = LAYERS * KV // width
    assert needs(model, quantized, rows=3, prompt=129, answer=1).disk == 3 * (130 + 128) * (elements + 4 * elements // HEAD)


def test_a_ring_bounds_memory_and_disk() -> None:
    """A ring keeps a window of tokens and the pages at its ends, however long the row."""
    ring = replace(PACKED, kv=KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER, window_tokens=64)
    long, longer = needs(layout=ring, rows=2, prompt=1, answer=4000), needs(layout=ring, rows=2, prompt=1, answer=8000)
    assert long.disk == longer.disk == 2 * (64 + 2 * 128) * LAYERS * KV
    assert long.kv == longer.kv


def test_a_cache_in_memory_has_no_files() -> None:
    """Nor is anything known to be taken by a model of which nothing is known."""
    assert kv_file_bytes(MODEL, KVCacheStrategy.RESIDENT, rows=8, tokens=1000, window_tokens=64) == 0


# --- weights


def test_layers_that_pass_through_take_turns() -> None:
    """Of layers kept in host memory two at a time are on the device; of those on disk three at a time are in host memory."""
    tokenizer = WORDS * TOKENIZER_BYTES
    whole = needs(layout=CUDA, prompt=10)
    aside = needs(layout=replace(CUDA, host_layers=(1, 2, 3)), prompt=10)
    assert whole.weights - aside.weights == (3 - DEVICE_SLOTS) * LAYER
    assert (whole.host, aside.host) == (tokenizer, tokenizer + 3 * LAYER)
    streamed = needs(layout=replace(CUDA, host_layers=(1,), disk_layers=(2, 3)), prompt=10)
    assert streamed.weights == aside.weights
    assert streamed.host == tokenizer + (1 + HOST_SLOTS) * LAYER
    assert streamed.disk == 0  # weights stream from the model's own folder, not from the cache


def test_experts_that_come_one_by_one_leave_their_layers() -> None:
    """Two layers pass without their experts, four slots hold one expert with its padding; told of none, layers pass whole."""
    model = replace(MODEL, expert_count=8, experts_per_token=2, layer_expert_bytes=(0, 400_000, 320_000, 400_000))
    streamed = replace(CUDA, disk_layers=(1, 2))
    whole = needs(model, streamed, prompt=10)
    routed = needs(model, replace(streamed, is_routed=True), prompt=10)
    expert = 50_000 + 2 * BLOCK_BYTES
    assert whole.weights - routed.weights == DEVICE_SLOTS * 320_000 - EXPERT_SLOTS * expert
    assert needs(layout=replace(streamed, is_routed=True), prompt=10) == needs(layout=streamed, prompt=10)
    assert needs(model, replace(CUDA, is_routed=True), prompt=10) == needs(model, CUDA, prompt=10)


def test_experts_in_half_precision_are_compiled_for() -> None:
    """On the CPU alone, and only where they come one by one."""
    model = replace(MODEL, dtype="bfloat16", expert_count=8, layer_expert_bytes=(400_000,) * LAYERS)
    routed = replace(GREEDY, disk_layers=(1,), is_routed=True)
    given = needs(model, replace(routed, is_routed=False), prompt=10).workspace
    assert needs(model, routed, prompt=10).workspace == given + COMPILED_BYTES
    assert needs(replace(model, dtype="float32"), routed, prompt=10).workspace == given
    assert needs(model, replace(routed, device_kind="cuda"), prompt=10).workspace == WORKSPACE_BYTES["cuda"]


def test_a_vocabulary_on_disk_takes_a_tile_of_a_slot() -> None:
    """Embedding and head are gone; their tile passes through the slots of the layers, and its logits are there twice."""
    streamed = replace(CUDA, disk_layers=(1, 2))
    kept, gone = (needs(layout=replace(streamed, vocabulary_on_disk=on_disk), prompt=1) for on_disk in (False, True))
    assert tile_bytes(MODEL) == 258_048  # all 1,000 rows, in whole blocks
    assert kept.weights - gone.weights == 512_000
    assert gone.logits - kept.logits == WORDS * 4
    small = replace(MODEL, layer_bytes=(1000,) * LAYERS, weight_bytes=LAYERS * 1000 + 512_000)
    slots = needs(small, replace(streamed, vocabulary_on_disk=True), prompt=1).weights - 2 * 1000
    assert slots == DEVICE_SLOTS * tile_bytes(MODEL)


@pytest.mark.parametrize(
    ("facts", "gone"),
    [
        ({}, 512_000),
        ({"head_bytes": 0}, 256_000),
        ({"embedding_bytes": 300_000}, 512_000),
        ({"embedding_bytes": 255_999}, 0),
        ({"head_bytes": 255_999}, 0),
        ({"vocabulary_size": 0}, 0),
        ({"weight_bytes": LAYERS * LAYER + 500_000}, 0),
    ],
)
def test_only_whole_vocabulary_matrices_leave(facts: dict[str, int], gone: int) -> None:
    """A tied pair is one; tables of positions stay; what is no matrix of vocabulary and width cannot be told from the rest."""
    assert vocabulary_bytes(replace(MODEL, **facts)) == gone  # type: ignore[arg-type]


def test_without_a_known_prompt_all_may_be_prompt() -> None:
    """The most careful reading, and never less than any division into prompt and answer."""
    careful = estimate_memory(MODEL, GREEDY, rows=4, tokens=500)
    assert careful == estimate_memory(MODEL, GREEDY, rows=4, tokens=500, prompt_tokens=500)
    assert all(careful.device_bytes >= needs(rows=4, prompt=prompt, answer=500 - prompt).device_bytes for prompt in (1, 250, 499))


def test_the_page_about_placement_has_the_formulae() -> None:
    """They stand beside the code that computes them; the page shows the same lines."""
    formulae = (estimates.__doc__ or "").partition("before it has a model (`RUNTIME_BYTES`).\n\n")[2].partition("\n\nSources:")[0]
    page = Path(__file__).parents[3].joinpath("docs", "placement.md").read_text(encoding="utf-8")
    assert len(formulae.splitlines()) > 20
    assert f"```\n{formulae}\n```" in page
