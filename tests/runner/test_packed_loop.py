"""Do rows that share passes, beginnings and guesses get the tokens that each gets alone? Float32 throughout."""

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.packing import PACKED_MODELS
from ollm_service.core.plan import PassId
from ollm_service.core.wire import AttemptFailed, BatchStarted, Finished, Message
from scripts.train_demo_model import make_tokenizer
from tests.runner.commands import answers, make_command, of_kind, only, results_of, run, texts, work_row
from tests.runner.forcing import packed_logits, plain_logits
from tests.runner.models import plain_greedy, save_model
from tests.runner.test_exactness import PROMPTS, some_text
from workers.runner.attempt import Attempt
from workers.runner.backends import generic
from workers.runner.engine import Engine
from workers.runner.interruptions import StopRequested
from workers.runner.passes.specialization import AppliedPasses
from workers.runner.progress import Pulse

SHARED = some_text(70, seed=5)
ALIKE = [SHARED + some_text(length, seed=length) for length in (3, 40, 1, 90)]
# Of `PACKED_MODELS` those that are no causal language models by themselves, or have tests of their own.
ELSEWHERE = {"gemma3", "voxtral", "qwen3_next"}
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def any_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small model of any type that runs in packs, with sliding layers where it has them."""
    root = tmp_path_factory.mktemp("packed")

    def make(kind: str) -> Path:
        folder = root / kind
        if folder.exists():
            return folder
        tokenizer = make_tokenizer()
        small = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 4,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 1024,
            "sliding_window": 24,
            "use_sliding_window": True,
            "max_window_layers": 2,
            "num_local_experts": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "initializer_range": 0.3,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        known = AutoConfig.for_model(kind).to_dict()
        config = AutoConfig.for_model(kind, **{name: value for name, value in small.items() if name in known})
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers does not annotate it
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("kind", sorted(PACKED_MODELS - ELSEWHERE))
def test_logits_of_a_pack_are_those_of_plain_transformers(any_model: Callable[[str], Path], kind: str) -> None:
    """Of every type of model that runs in packs; prompts in blocks of 50 tokens, then tokens that are given."""
    folder = any_model(kind)
    prompts, forced = (PROMPTS[1][:130], PROMPTS[6][:57], PROMPTS[2]), PROMPTS[6][200:212]
    plain = plain_logits(folder, prompts, forced)
    ours = packed_logits(folder, prompts, forced, block_tokens=50)
    assert float((ours - plain).abs().max()) <= 1e-3 * max(1.0, float(plain.std()))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe", "gpt-oss", "gpt2"])
@pytest.mark.parametrize("kv", [KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED])
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_a_shared_beginning_is_computed_once_and_changes_nothing(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path, family: str, kv: KVCacheStrategy, micro_batch: int
) -> None:
    """Rows that begin alike, among others that do not: plain tokens, and the beginning's are computed for one of them."""
    prompts = [*ALIKE, *PROMPTS[:3]]
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(prompts)]
    command = make_command(
        families(family), rows, passes=(PassId.DISK_CACHE,), kv=kv, cache_dir=tmp_path, micro_batch=micro_batch
    )
    messages = run(engine, command)
    assert {row: result.text for row, result in results_of(messages).items()} == {
        index: plain_greedy(families(family), prompt, NEW_TOKENS) for index, prompt in enumerate(prompts)
    }
    assert only(messages, Finished).measured["shared_prompt_tokens"] >= 3 * len(SHARED)


def test_a_freed_place_is_taken_at_once(engine: Engine, llama: Path) -> None:
    """Rows with answers of 1 to 12 tokens, three at a time: hardly more passes than places need that are always taken."""
    limits = [12, 1, 3, 5, 9, 2, 2, 7, 4, 6, 1, 8]
    rows = [work_row(index, f"row {index}", max_new_tokens=limit) for index, limit in enumerate(limits)]
    messages = run(engine, make_command(llama, rows, micro_batch=3))
    assert all(len(message.rows) <= 3 for message in of_kind(messages, BatchStarted))
    assert {row: result.completion_tokens for row, result in results_of(messages).items()} == dict(enumerate(limits))
    assert only(messages, Finished).measured["passes"] <= -(-sum(limits) // 3) + 2


def test_guesses_save_passes_and_change_no_token(llama: Path, tmp_path: Path) -> None:
    """A model that says the same again and again, streamed: several tokens a pass, and the tokens of plain transformers.

    By a clock to which all passes are alike, as they nearly are where weights stream.
    """
    engine = Engine(clock=itertools.count().__next__)
    folder = repeating(llama, tmp_path / "repeats")
    rows = [work_row(index, prompt, max_new_tokens=60) for index, prompt in enumerate(("abcabcabcabc", "xyxyxyxyxy"))]
    command = make_command(
        folder, rows, passes=(PassId.CPU_OFFLOAD,), cache_dir=tmp_path / "cache", disk_layers=(0, 1), micro_batch=2
    )
    messages = run(engine, command)
    assert {row: result.text for row, result in results_of(messages).items()} == {
        row.row: plain_greedy(folder, str(row.prompt), 60) for row in rows
    }
    measured = only(messages, Finished).measured
    assert measured["tried_tokens"] > 0
    assert measured["passes"] < 60 / 2


def test_an_engine_that_tries_nothing_takes_a_pass_for_each_token(llama: Path, tmp_path: Path) -> None:
    """The same answers, with as many passes as tokens."""
    folder = repeating(llama, tmp_path / "repeats")
    row = work_row(0, "abcabcabcabc", max_new_tokens=40)
    command = make_command(folder, [row], passes=(PassId.CPU_OFFLOAD,), cache_dir=tmp_path / "cache", disk_layers=(0, 1))
    messages = run(Engine(tries_ahead=False), command)
    assert {result.text for result in results_of(messages).values()} == {plain_greedy(folder, str(row.prompt), 40)}
    measured = only(messages, Finished).measured
    assert (measured["passes"], measured["tried_tokens"]) == (40, 0)


def repeating(source: Path, folder: Path) -> Path:
    """A llama whose layers add nothing and whose head turns each token into the next of a cycle of five."""
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    for name, tensor in model.state_dict().items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    embeddings = model.get_input_embeddings().weight.data
    cycles = [embeddings[first : first + 5].roll(1, dims=0) for first in range(0, len(embeddings), 5)]
    model.get_output_embeddings().weight.data.copy_(torch.cat(cycles))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_answers_end_where_they_would_end_one_token_at_a_time(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """Stop strings and limits hold although several tokens come at once."""
    folder = repeating(llama, tmp_path / "repeats")
    prompt = "abcabcabcabc"
    whole = plain_greedy(folder, prompt, 60)
    stop = whole[20:23]
    rows = [work_row(limit, prompt, max_new_tokens=limit) for limit in range(1, 25)]
    found = texts(engine, make_command(folder, [*rows, work_row(99, prompt, max_new_tokens=60, stop=[stop])]))
    assert found == {limit: whole[:limit] for limit in range(1, 25)} | {99: whole[: whole.index(stop)]}


@pytest.mark.parametrize("micro_batch", [1, 8])
@pytest.mark.parametrize("guesses_well", [True, False])
def test_a_draft_model_changes_no_token(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path, micro_batch: int, *, guesses_well: bool
) -> None:
    """The model itself as its own draft, or another that is always wrong: plain tokens, with the layers from disk."""
    folder = families("qwen2")
    draft = folder if guesses_well else save_model(tmp_path / "other", "llama", seed=3)
    rows = [work_row(index, prompt, max_new_tokens=24) for index, prompt in enumerate(PROMPTS[:5])]
    command = make_command(
        folder, rows, passes=(PassId.CPU_OFFLOAD,), cache_dir=tmp_path / "cache", disk_layers=(0, 1), micro_batch=micro_batch
    )
    messages = run(engine, replace(command, draft_dir=str(draft), draft_digest="d" + str(guesses_well)))
    assert {row: result.text for row, result in results_of(messages).items()} == {
        row.row: plain_greedy(folder, str(row.prompt), 24) for row in rows
    }
    assert only(messages, Finished).measured["tried_tokens"] > 0


@pytest.mark.parametrize("longest", [None, "draft", "model"])
def test_a_draft_need_not_have_the_models_sizes(engine: Engine, tmp_path: Path, longest: str | None) -> None:
    """With a shorter context, or with padding in either vocabulary, it guesses where it can; tokens are the model's own."""
    folder = save_model(tmp_path / "model", "llama", max_position_embeddings=2048)
    draft = save_model(tmp_path / "draft", "gpt2", seed=3)
    if longest is not None:
        padded = draft if longest == "draft" else folder
        model: Any = AutoModelForCausalLM.from_pretrained(padded)
        model.resize_token_embeddings(model.config.vocab_size + 50)
        head = model.get_output_embeddings().weight.data
        head[-50:] = head[:50] * 3  # so that the tokens that no text has are often the best
        model.save_pretrained(padded)
    rows = [work_row(0, "ab cd " * 180, max_new_tokens=8), work_row(1, "hello", max_new_tokens=20)]
    command = replace(make_command(folder, rows), draft_dir=str(draft), draft_digest=f"sizes {longest}")
    found = answers(engine, command)
    assert {row: (result.text, result.completion_tokens) for row, result in found.items()} == {
        row.row: (plain_greedy(folder, str(row.prompt), row.generation.max_new_tokens), row.generation.max_new_tokens)
        for row in rows
    }


def test_a_draft_of_another_tokenizer_is_refused(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """Its tokens would be other texts; the attempt ends for good and says what to do."""
    draft = save_model(tmp_path / "draft", "llama")
    tokenizer: Any = AutoTokenizer.from_pretrained(draft)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(draft)
    messages = run(engine, replace(make_command(llama, [work_row(0, "hello")]), draft_dir=str(draft), draft_digest="other"))
    failure = only(messages, AttemptFailed)
    assert (failure.code, failure.is_permanent) == ("draft_tokenizer_differs", True)
    assert "Name one of the same" in failure.message


def test_a_stop_is_obeyed_between_two_blocks(llama: Path) -> None:
    """A long prompt does not hold up the end: a stop that comes while a layer is at work acts before its next block."""
    stop, messages = threading.Event(), list[Message]()
    model = generic.load(make_command(llama, []), lambda: None)
    calls: list[int] = []

    def stop_at_the_second(_module: Any, arguments: Any) -> None:
        calls.append(arguments[0].shape[1])
        if len(calls) == 2:
            stop.set()

    model.layers()[0].get_submodule("mlp").register_forward_pre_hook(stop_at_the_second)
    command = make_command(llama, [work_row(index, "abcdefgh"[index] * 900, max_new_tokens=2) for index in range(8)])
    attempt = Attempt(command, messages.append, Pulse(messages.append, stop))
    with pytest.raises(StopRequested):
        attempt.run(model, AppliedPasses(()))
    assert calls == [1024, 1024], "of seven blocks"
    assert "forward" not in model.layers()[0].__dict__, "the layer is as it was"
