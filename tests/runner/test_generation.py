"""What does a row get: its text, its reason to finish, its counts, its own randomness, or its own error?"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ollm_service.core.leasing import RowResult, WorkRow
from ollm_service.core.options import GenerationConfig
from ollm_service.core.wire import BatchDone, BatchStarted
from tests.runner.commands import answers, chat_row, make_command, of_kind, results_of, run, texts, work_row
from tests.runner.models import CONTEXT, DEMO_MODEL
from workers.runner.batching import MicroBatches
from workers.runner.engine import Engine
from workers.runner.prompts import EncodedRow
from workers.runner.sampling import choose_tokens, make_generator, warp


def code_of(result: RowResult) -> str | None:
    """The error code of a result."""
    return None if result.error is None else result.error.code


def test_an_end_token_stops_the_row(engine: Engine) -> None:
    """The answer ends with `stop`; the end token is counted but is not in the text."""
    result = answers(engine, make_command(DEMO_MODEL, [work_row(0, "12+34=", max_new_tokens=20)]))[0]
    assert (result.text, result.finish_reason) == ("46", "stop")
    assert (result.prompt_tokens, result.completion_tokens) == (len("12+34=") + 1, 3)


def test_a_limit_ends_the_row_with_length(engine: Engine, llama: Path) -> None:
    """A row that reaches max_new_tokens finishes with `length` and has exactly so many tokens."""
    result = answers(engine, make_command(llama, [work_row(0, "hello", max_new_tokens=9)]))[0]
    assert (result.finish_reason, result.completion_tokens) == ("length", 9)


def test_the_context_clamps_the_row(engine: Engine, llama: Path) -> None:
    """Where the context has less room than was asked for, the row is cut there and its finish reason says so."""
    room = 5
    prompt = "x" * (CONTEXT - room - 1)
    found = answers(engine, make_command(llama, [work_row(0, prompt, max_new_tokens=50), work_row(1, prompt, max_new_tokens=5)]))
    assert (found[0].finish_reason, found[0].completion_tokens) == ("context", room)
    assert (found[1].finish_reason, found[1].completion_tokens) == ("length", room)


def test_stop_strings_cut_the_text(engine: Engine, llama: Path) -> None:
    """The text ends before the earliest stop string, even one that spans tokens; the row finishes with `stop`."""
    whole = answers(engine, make_command(llama, [work_row(0, "hello", max_new_tokens=30)]))[0].text
    assert whole is not None
    late, early = whole[20:24], whole[10:13]
    rows = [work_row(0, "hello", max_new_tokens=30, stop=[late, early]), work_row(1, "hello", max_new_tokens=30, stop=["\0"])]
    found = answers(engine, make_command(llama, rows))
    cut = min(whole.index(late), whole.index(early))
    assert (found[0].text, found[0].finish_reason) == (whole[:cut], "stop")
    assert (found[1].text, found[1].finish_reason) == (whole, "length")


def test_messages_go_through_the_chat_template_once(engine: Engine) -> None:
    """A template that brings the first special token gets no second one; parts of text are joined."""
    rows = [chat_row(0, "12+34"), chat_row(1, [{"type": "text", "text": "12"}, {"type": "text", "text": "+34"}])]
    found = answers(engine, make_command(DEMO_MODEL, rows))
    assert [result.text for result in found.values()] == ["46", "46"]
    # <s> <|user|> 1 2 + 3 4 <|assistant|>
    assert [result.prompt_tokens for result in found.values()] == [8, 8]


def test_a_bad_row_fails_alone(engine: Engine, llama: Path) -> None:
    """Rows that cannot run get an error with a code; the others are answered, each exactly once."""
    rows = [
        work_row(0, None),
        work_row(1, "y" * CONTEXT),
        work_row(2, "hello", max_new_tokens=3),
        chat_row(3, [{"type": "image_url", "image_url": {}}]),
        WorkRow(row=4, custom_id="system", prompt=None, messages=({"role": "wizard", "content": "x"},), generation=rows_of(3)),
        WorkRow(row=5, custom_id="none", prompt=None, messages=(), generation=rows_of(3)),
        WorkRow(row=6, custom_id="silent", prompt=None, messages=({"role": "user", "content": None},), generation=rows_of(3)),
        chat_row(7, "hello", max_new_tokens=3),
    ]
    found = answers(engine, make_command(llama, rows))
    assert {row: code_of(result) for row, result in found.items()} == {
        0: "prompt_missing",
        1: "context_length_exceeded",
        2: None,
        3: "unsupported_content",
        4: "invalid_messages",
        5: "invalid_messages",
        6: "invalid_messages",
        7: None,
    }


def rows_of(tokens: int) -> GenerationConfig:
    """Greedy, so many tokens."""
    return GenerationConfig(max_new_tokens=tokens)


def test_messages_need_a_chat_template(engine: Engine, model_dirs: dict[str, Path]) -> None:
    """Without a chat template messages are a row error, and a raw prompt still runs."""
    rows = [chat_row(0, "hello"), work_row(1, "hello", max_new_tokens=2)]
    found = answers(engine, make_command(model_dirs["llama-without-template"], rows))
    assert [code_of(found[0]), code_of(found[1])] == ["chat_template_missing", None]


def test_errors_do_not_quote_the_row(engine: Engine, llama: Path) -> None:
    """No error message repeats what the row said."""
    secret = "hunter2"
    rows = [
        work_row(0, secret * CONTEXT),
        WorkRow(row=1, custom_id="a", prompt=None, messages=({"role": secret, "content": secret},), generation=rows_of(1)),
    ]
    found = answers(engine, make_command(llama, rows))
    assert all(result.error is not None and secret not in result.error.message for result in found.values())


def test_a_plan_of_refused_rows_alone_still_ends(engine: Engine, llama: Path) -> None:
    """When no row can run, the errors are reported and nothing is in flight."""
    messages = run(engine, make_command(llama, [work_row(0, None), work_row(1, None)]))
    assert set(results_of(messages)) == {0, 1}
    assert not of_kind(messages, BatchStarted)


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_a_seeded_row_does_not_depend_on_its_neighbours(engine: Engine, llama: Path, micro_batch: int) -> None:
    """A sampled row with a seed gets the same text alone and in any micro-batch."""
    rows = [
        work_row(index, f"row number {index % 4}", max_new_tokens=10, temperature=0.9, top_p=0.95, top_k=30, seed=index // 4)
        for index in range(8)
    ]
    alone = {row.row: texts(engine, make_command(llama, [row]))[row.row] for row in rows}
    assert texts(engine, make_command(llama, rows[::-1], micro_batch=micro_batch)) == alone
    assert len(set(alone.values())) > 4, "different seeds and prompts should differ"


def test_rows_without_a_seed_differ(engine: Engine, llama: Path) -> None:
    """Equal rows without a seed are drawn independently of each other."""
    rows = [work_row(index, "same", max_new_tokens=16, temperature=2.0) for index in range(8)]
    assert len(set(texts(engine, make_command(llama, rows)).values())) > 1


def test_rows_that_choose_differently_share_a_pass(engine: Engine, llama: Path) -> None:
    """Greedy and sampled rows run together, and each gets what it gets alone."""
    rows = [work_row(index, "hello", max_new_tokens=1 + index, temperature=index % 3, seed=index) for index in range(6)]
    messages = run(engine, make_command(llama, rows))
    assert set(of_kind(messages, BatchStarted)[0].rows) == set(range(6))
    alone = {row.row: texts(engine, make_command(llama, [row]))[row.row] for row in rows}
    assert {row: result.text for row, result in results_of(messages).items()} == alone


def test_rows_with_the_most_tokens_to_answer_run_first(engine: Engine, llama: Path) -> None:
    """Then those with the longest prompts, as many at a time as the placement allows; each leaves its place to the next."""
    rows = [work_row(index, "x" * (10 * index + 1), max_new_tokens=1 + index // 3) for index in range(5)]
    messages = run(engine, make_command(llama, rows, micro_batch=2))
    assert [message.rows for message in of_kind(messages, BatchStarted)] == [(3, 4), (2, 1), (0,)]
    assert [len(message.results) for message in of_kind(messages, BatchDone)] == [2, 2, 1]


def test_a_halved_micro_batch_is_tried_again() -> None:
    """A micro-batch that was put back comes again in halves, before everything else."""
    batches = MicroBatches((encoded(row) for row in range(4)), most_rows=4)
    batches.halve(batches.take())
    assert [[row.row for row in batches.take()] for _ in range(2)] == [[0, 1], [2, 3]]
    assert not batches


def test_rows_longer_than_the_placement_are_left_for_others(engine: Engine, llama: Path) -> None:
    """A row beyond what the placement holds gets no result, one beyond the context gets its error, and the rest run."""
    rows = [
        work_row(0, "hello", max_new_tokens=4),
        work_row(1, "hello " * 20, max_new_tokens=4),
        work_row(2, "hello " * 9_000, max_new_tokens=4),
    ]
    command = make_command(llama, rows)
    messages = run(engine, replace(command, placement=replace(command.placement, longest_row_tokens=30)))
    results = results_of(messages)
    assert set(results) == {0, 2}
    assert results[0].text is not None
    assert results[2].error is not None
    assert results[2].error.code == "context_length_exceeded"


def test_a_suspect_runs_last_and_alone() -> None:
    """A row that crashed a runner before takes no other row with it, however long it is."""
    batches = MicroBatches((encoded(row) for row in range(4)), most_rows=4, suspects={0, 2})
    assert [[row.row for row in batches.take()] for _ in range(3)] == [[1, 3], [0], [2]]


def encoded(row: int) -> EncodedRow:
    """A row of three tokens."""
    return EncodedRow(row=row, tokens=(1, 2, 3), generation=rows_of(4), max_new_tokens=4, is_clamped=False)


def test_top_k_and_top_p_drop_the_rest() -> None:
    """top_k keeps the best k tokens, top_p the fewest that reach p together, and always the best one."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    assert (warp(logits, 1.0, None, 2) > 0).tolist() == [[False, False, True, True]]
    assert (warp(logits, 1.0, 0.65, None) > 0).tolist() == [[False, False, True, True]]
    assert (warp(logits, 1.0, 1e-6, None) > 0).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(0.7, None, None), (1.3, 0.9, None), (1.0, None, 7), (0.4, 0.6, 11)])
def test_probabilities_are_those_of_transformers(seed: int, temperature: float, top_p: float | None, top_k: int | None) -> None:
    """Its own warpers in the order in which its `generate` applies them."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed)) * 3
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p is not None:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    assert torch.equal(warp(logits, temperature, top_p, top_k), theirs.softmax(dim=-1))


def test_draws_follow_the_probabilities() -> None:
    """Over many seeds a token is drawn as often as its probability says."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(3000, 1)
    tokens = choose_tokens(logits, (1.0, None, None), [make_generator(seed) for seed in range(3000)])
    shares = torch.bincount(torch.tensor(tokens), minlength=3) / 3000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.04)
