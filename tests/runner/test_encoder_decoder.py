"""Do models that read a source and then write give the tokens of plain transformers, each row as it asked for?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DynamicCache, EncoderDecoderCache, GenerationConfig

from ollm_service.core.plan import BackendId
from ollm_service.core.wire import Finished
from scripts.train_demo_model import make_tokenizer
from tests.families import FAMILIES
from tests.runner.commands import answers, only, results_of, run, texts, work_row
from tests.runner.planned import planned_command, profile_of
from workers.runner.engine import Engine

NEW_TOKENS = 12
PROMPTS = ("translate: the cat sat on the mat", "hello", "a somewhat longer source than the one before it", "12+34=", "x")


def save(folder: Path, family: str) -> Path:
    """A model of the family whose characters are tokens; the weights are wide enough for varied answers."""
    tokenizer = make_tokenizer()
    architecture, config = FAMILIES[family]()
    config.update(
        {
            "vocab_size": len(tokenizer),
            "initializer_factor": 4.0,
            "init_std": 0.3,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "decoder_start_token_id": tokenizer.bos_token_id,
        }
    )
    torch.manual_seed(3)
    model: Any = architecture(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_bos_token_id=tokenizer.convert_tokens_to_ids("q") if family == "bart" else None,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain(folder: Path, prompt: str) -> str:
    """What transformers itself generates for one source alone, greedily."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            # By default it makes room for as many layers as the encoder has, and breaks where the decoder has more.
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


@pytest.fixture(scope="module", params=["t5", "t5-untied", "bart"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder-decoder."""
    return save(tmp_path_factory.mktemp("seq2seq") / request.param, request.param)


def test_greedy_tokens_are_those_of_plain_transformers(engine: Engine, folder: Path) -> None:
    """Sources of different lengths in one batch give what each gives alone; the source is no part of the answer."""
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    command = planned_command(folder, rows)
    assert command.runtime_plan.backend_id == BackendId.TRANSFORMERS_GENERIC
    expected = {index: plain(folder, prompt) for index, prompt in enumerate(PROMPTS)}
    assert len(set(expected.values())) > 1
    messages = run(engine, command)
    results = results_of(messages)
    assert {row: result.text for row, result in results.items()} == expected
    assert [results[index].prompt_tokens for index in range(len(PROMPTS))] == [len(prompt) + 1 for prompt in PROMPTS]
    measured = only(messages, Finished).measured
    assert measured["completion_tokens"] == sum(result.completion_tokens for result in results.values())


def test_a_seed_gives_the_same_answer_in_any_company(engine: Engine, folder: Path) -> None:
    """A sampled row depends on its seed alone, and another seed gives another answer."""
    rows = [work_row(0, PROMPTS[0], max_new_tokens=NEW_TOKENS, temperature=1.5, seed=1)]
    rows += [work_row(index, PROMPTS[0], max_new_tokens=NEW_TOKENS, temperature=1.5, seed=index) for index in (1, 2, 3)]
    alone = texts(engine, planned_command(folder, rows, micro_batch=1))
    together = texts(engine, planned_command(folder, rows))
    assert alone == together
    assert together[0] == together[1]
    assert len(set(together.values())) > 1


def test_each_row_ends_as_it_asked(engine: Engine, folder: Path) -> None:
    """A limit, a stop string and an end token each end a row of the same batch, with the reason and the counts."""
    whole = answers(engine, planned_command(folder, [work_row(0, PROMPTS[0], max_new_tokens=NEW_TOKENS)]))[0]
    assert whole.text
    stop = whole.text[2:4]
    rows = [work_row(0, PROMPTS[0], max_new_tokens=3), work_row(1, PROMPTS[0], max_new_tokens=NEW_TOKENS, stop=[stop])]
    found = answers(engine, planned_command(folder, rows))
    assert (found[0].finish_reason, found[0].completion_tokens) == ("length", 3)
    assert (found[1].finish_reason, found[1].text) == ("stop", whole.text[: whole.text.index(stop)])


def test_source_and_answer_have_a_context_each(engine: Engine, tmp_path: Path) -> None:
    """A source that fills the context leaves all of it to the answer; a longer source is a row error."""
    folder = save(tmp_path / "bart", "bart")
    context = 64
    assert profile_of(folder).most_row_tokens == 2 * context
    rows = [
        work_row(0, "x" * (context - 1), max_new_tokens=5),
        work_row(1, "x" * context, max_new_tokens=5),
        work_row(2, "x", max_new_tokens=2 * context, stop=["\0"]),
    ]
    found = answers(engine, planned_command(folder, rows))
    assert found[0].error is None
    assert found[1].error is not None
    assert found[1].error.code == "context_length_exceeded"
    assert found[2].finish_reason in ("context", "stop")
    assert found[2].completion_tokens <= context
