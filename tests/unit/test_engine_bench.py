"""Do the benchmark's lengths, optima and ratios say what they claim?"""

import statistics
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.engine.comparisons import (
    comparisons,
    fraction_of_disk,
    fraction_of_experts,
    mixed_lengths_efficiency,
    tokens_a_second,
)
from bench.engine.copying import TEXT_TOKENS, copying_row
from bench.engine.work import (
    AT_A_TIME,
    JOB_BEGINNING,
    JOB_ROWS,
    LONG_PROMPT,
    WORK,
    batches,
    fewest_passes,
    log_normal,
    shared_work_ratio,
    work,
)
from bench.texts import make_tokenizer, words


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 8))
def test_no_order_of_rows_takes_fewer_passes_than_the_computed_optimum(answers: list[int], at_a_time: int) -> None:
    """Longest first, each place taken again at once, comes to within the longest answer of it and never below."""
    waiting, passes = deque(sorted(answers, reverse=True)), 0
    running: list[int] = []
    while waiting or running:
        while waiting and len(running) < at_a_time:
            running.append(waiting.popleft())
        running = [left - 1 for left in running if left > 1]
        passes += 1
    best = fewest_passes(answers, at_a_time)
    assert best <= passes <= best + max(answers)


def test_lengths_have_the_median_and_spread_that_they_are_named_for() -> None:
    """And are the same each time, at least 1."""
    lengths = log_normal(4001, median=32, sigma=0.8, seed=3)
    assert lengths == log_normal(4001, median=32, sigma=0.8, seed=3)
    assert 30 <= statistics.median(lengths) <= 34
    quarters = statistics.quantiles(lengths, n=4)
    assert quarters[2] / quarters[0] == pytest.approx(2.94, abs=0.2), "e to the power of 2 · 0.674 · 0.8"
    assert min(log_normal(4000, median=1, sigma=2.0, seed=3)) == 1


def test_the_job_is_the_one_of_the_table() -> None:
    """192 rows begin with the same 256 tokens, go on differently, and none is alike."""
    rows = work("job")
    assert len(rows) == JOB_ROWS == 192
    beginnings = {tuple(row.prompt.split()[:JOB_BEGINNING]) for row in rows}
    assert len(beginnings) == 1
    assert len({row.prompt for row in rows}) == 192
    assert 27 <= statistics.median(len(row.prompt.split()) - JOB_BEGINNING for row in rows) <= 37
    assert 10 <= statistics.median(row.answer_tokens for row in rows) <= 14


def test_every_word_is_one_token_in_both_vocabularies() -> None:
    """So that a work's tokens are counted by its words."""
    text = words(200, seed=1)
    for tokenizer in (make_tokenizer(), make_tokenizer(128_256)):
        assert len(tokenizer(text)["input_ids"]) == 200
    assert len(make_tokenizer(128_256)) == 128_256
    with pytest.raises(ValueError, match="cannot be made"):
        make_tokenizer(100)


@pytest.mark.parametrize("name", sorted(WORK))
def test_a_quick_look_has_no_more_work(name: str) -> None:
    """Rows and their tokens."""
    whole, quick = work(name), work(name, is_quick=True)
    assert 1 <= len(quick) <= len(whole)
    assert sum(len(row.prompt.split()) for row in quick) <= sum(len(row.prompt.split()) for row in whole)
    assert max(len(row.prompt.split()) for row in whole) <= LONG_PROMPT


def test_rows_that_share_are_computed_in_the_ratio_of_their_tokens() -> None:
    """16 rows of 896 shared and 64 own tokens: an eighth."""
    assert shared_work_ratio(16, 896, 64) == 8
    assert shared_work_ratio(5, 0, 64) == 1
    shared, apart = work("shared"), work("apart")
    assert {len(row.prompt.split()) for row in (*shared, *apart)} == {960}
    assert len({row.prompt.split()[0] for row in apart}) > 1
    assert len({tuple(row.prompt.split()[:896]) for row in shared}) == 1


def test_a_text_is_copied_with_its_capitals_made_small() -> None:
    """Some are there, and the answer is as long as the text."""
    prompt, expected = copying_row(seed=5)
    first, *text, last = prompt.split()
    assert (first, last) == ("<text>", "<answer>")
    assert [word.lower() for word in text] == expected.split() != text
    assert len(text) == TEXT_TOKENS


def test_batches_keep_the_order_of_arrival() -> None:
    """The last may be smaller."""
    rows = work("job")
    found = batches(rows, 50)
    assert [row for batch in found for row in batch] == list(rows)
    assert [len(batch) for batch in found] == [50, 50, 50, 42]


def test_ratios_follow_their_definitions() -> None:
    """Above one is in our favour, fractions are parts of a whole."""
    probes = {"before": {"bytes_a_second": 3.0}, "after": {"bytes_a_second": 1.0}}
    assert fraction_of_disk({**probes, "ours": {"layer_bytes": 6.0, "step_seconds": 4.0}}) == 0.75
    prompt = {"expert_bytes_read": 50.0, "expert_bytes_routed_ideal": 48.0, "expert_bytes_all": 64.0}
    steps = {"expert_bytes_read": 82.0, "expert_bytes_routed_ideal": 72.0, "expert_bytes_all": 192.0}
    assert fraction_of_experts({"prompt": prompt, "steps": steps}, "read") == 0.25
    assert fraction_of_experts({"prompt": prompt, "steps": steps}, "routed_ideal") == 0.1875
    assert tokens_a_second({"answer_tokens": 60.0, "seconds": 4.0}) == 15
    best = fewest_passes([row.answer_tokens for row in work("job")], AT_A_TIME)
    assert mixed_lengths_efficiency({"ours": {"passes": 2.0 * best}}) == 0.5


def test_every_figure_comes_from_parts_that_its_comparison_runs() -> None:
    """And no two comparisons give one key."""
    found = comparisons()
    keys = [key for comparison in found.values() for key in comparison.figures]
    assert len(keys) == len(set(keys))
    for comparison in found.values():
        assert all(set(figure.parts) <= set(comparison.parts) for figure in comparison.figures.values())
