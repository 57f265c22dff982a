"""What becomes of a plan: a warm or a fresh model, a stop, a lack of memory, a folder that does not load?"""

import errno
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ollm_service.core.plan import PassId
from ollm_service.core.wire import (
    AttemptFailed,
    BatchDone,
    BatchStarted,
    Execute,
    Finished,
    Loaded,
    Message,
    Progress,
    SpecializationFailed,
    Stopped,
)
from tests.runner.commands import make_command, of_kind, only, results_of, run, work_row
from tests.runner.models import plain_greedy
from workers.runner.attempt import Attempt
from workers.runner.backends import generic, native
from workers.runner.engine import Engine
from workers.runner.memory import is_out_of_memory
from workers.runner.model import LoadedModel
from workers.runner.passes.mlp_chunking import MlpChunking
from workers.runner.passes.specialization import AppliedPasses, SpecializationPass
from workers.runner.progress import Pulse


def test_a_warm_model_is_not_loaded_again(llama: Path, model_dirs: dict[str, Path]) -> None:
    """The second plan for a model finds it warm; another model takes its place, and each answers as itself."""
    engine, rows = Engine(), [work_row(0, "hello", max_new_tokens=6)]
    runs = [run(engine, make_command(folder, rows)) for folder in (llama, llama, model_dirs["gpt2"], llama)]
    assert [only(messages, Loaded).was_warm for messages in runs] == [False, True, False, False]
    assert only(runs[1], Loaded).seconds == 0
    texts = [results_of(messages)[0].text for messages in runs]
    assert texts[0] == texts[1] == texts[3] != texts[2]


def test_a_model_is_gone_before_the_next_one_is_loaded(llama: Path, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Nothing of a plan with passes holds its model: on a small machine both would not fit."""
    held: list[weakref.ref[Any]] = []

    def watched(model: LoadedModel, command: Execute) -> Sequence[SpecializationPass]:
        held.append(weakref.ref(model.module))
        return native.planned_passes(model, command)

    engine, loading = Engine(watched), []

    def report(message: Message) -> None:
        if isinstance(message, Loaded):
            gc.collect()
            loading.append([ref() is None for ref in held])

    passes = (PassId.DISK_CACHE, PassId.CPU_OFFLOAD, PassId.MLP_CHUNKING)
    first = make_command(llama, [work_row(0, "x")], passes=passes, cache_dir=tmp_path, disk_layers=(0, 1))
    for command in (first, make_command(model_dirs["gpt2"], [work_row(0, "x")])):
        engine.execute(command, report, threading.Event())
    assert loading == [[], [True]]


def test_measured_counts_add_up(engine: Engine, llama: Path) -> None:
    """The last message counts the tokens of all results, and the memory and seconds that they took."""
    rows = [work_row(index, "hello", max_new_tokens=4) for index in range(5)]
    messages = run(engine, make_command(llama, rows, micro_batch=2))
    measured = only(messages, Finished).measured
    results = results_of(messages).values()
    assert measured["completion_tokens"] == sum(result.completion_tokens for result in results)
    assert measured["prompt_tokens"] == sum(result.prompt_tokens for result in results)
    # Three rows run after two others, two at a time.
    assert (measured["passes"], measured["largest_micro_batch"]) == (12, 2)
    assert measured["peak_host_bytes"] > 50_000_000
    assert 0 <= measured["peak_device_bytes"] < measured["peak_host_bytes"]
    assert measured["peak_load_bytes"] >= 0
    assert measured["tokens_per_second"] > 0
    # The first token of a row comes with its prompt, each further one with a pass of its own; nothing is padded here.
    assert measured["prefill_tokens"] == measured["prompt_tokens"]
    assert measured["decode_tokens"] >= measured["completion_tokens"] - len(results)
    assert 0 < measured["decode_seconds"] < measured["generate_seconds"]


def test_a_stop_ends_the_plan_between_steps(engine: Engine, llama: Path) -> None:
    """After a stop nothing more is generated, the last message is Stopped, and the next plan runs as if nothing had been."""
    messages, stop = [], threading.Event()

    def report(message: Message) -> None:
        messages.append(message)
        if isinstance(message, BatchStarted) and len(of_kind(messages, BatchStarted)) == 2:
            stop.set()

    rows = [work_row(index, "hello", max_new_tokens=4) for index in range(3)]
    engine.execute(make_command(llama, rows, micro_batch=1), report, stop)
    assert isinstance(messages[-1], Stopped)
    assert len(of_kind(messages, BatchDone)) == 1
    assert set(results_of(run(engine, make_command(llama, rows)))) == {0, 1, 2}


def test_what_is_answered_is_told_before_a_stop(llama: Path) -> None:
    """Answers that wait to be reported with others are not lost when the plan is stopped."""
    engine, messages, stop = Engine(report_seconds=1e6), list[Message](), threading.Event()

    def report(message: Message) -> None:
        messages.append(message)
        if isinstance(message, BatchStarted) and message.rows == (3,):
            stop.set()

    rows = [work_row(index, "hello", max_new_tokens=4) for index in range(4)]
    engine.execute(make_command(llama, rows, micro_batch=1), report, stop)
    assert isinstance(messages[-1], Stopped)
    assert set(results_of(messages)) == {0, 1, 2}


class Brittle(MlpChunking):
    """A pass that breaks with an error that no pass is meant to raise, where `breaks` says: in `apply` or in `forward`."""

    breaks = "apply"

    def apply(self) -> None:
        """Put itself in place, or break."""
        if self.breaks == "apply":
            raise TypeError("not the kind of model that was expected")
        super().apply()
        for layer in self._model.layers():
            layer.register_forward_pre_hook(self._break)

    @staticmethod
    def _break(_module: Any, _arguments: Any) -> None:
        raise TypeError("SECRET PROMPT")


@pytest.mark.parametrize("breaks", ["apply", "forward"])
def test_any_error_under_a_planned_pass_ends_the_specialization(llama: Path, breaks: str) -> None:
    """Whatever breaks before rows are reported is told as the passes' failure, with its type and never with a row's text."""
    rows, messages = [work_row(0, "hello", max_new_tokens=3)], list[Message]()
    command = make_command(llama, rows, passes=(PassId.MLP_CHUNKING,), chunk_rows=2)
    brittle = type("Brittle", (Brittle,), {"breaks": breaks})
    engine = Engine(lambda model, order: [brittle(model, order)])
    engine.execute(command, messages.append, threading.Event())
    failed = only(messages, SpecializationFailed)
    assert (failed.error_type, set(failed.outcomes)) == ("TypeError", {PassId.MLP_CHUNKING})
    assert "SECRET" not in failed.reason
    assert not of_kind(messages, BatchDone)


def nothing() -> None:
    """What is called while a model is loaded."""


@pytest.fixture
def cramped_model(llama: Path) -> LoadedModel:
    """A model whose memory holds two rows at a time, and none of 60 positions or more."""
    model = generic.load(make_command(llama, [work_row(0, "x")]), nothing)

    def refuse(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        if named["logits_to_keep"].numel() > 2 or int(named["position_ids"].max()) >= 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.module.register_forward_pre_hook(refuse, with_kwargs=True)
    return model


def test_a_micro_batch_out_of_memory_is_halved(cramped_model: LoadedModel, llama: Path) -> None:
    """Too many rows for the memory are tried again as halves; every row is answered once, and the halvings are measured."""
    rows = [work_row(index, "hello", max_new_tokens=3) for index in range(8)]
    messages = attempt_with(cramped_model, llama, rows)
    assert set(results_of(messages)) == set(range(8))
    assert [len(message.rows) for message in of_kind(messages, BatchStarted)] == [8, 4, 2, 2, 2, 2]
    assert only(messages, Finished).measured["memory_halvings"] == 2


def test_rows_that_begin_anew_share_their_beginning_again(cramped_model: LoadedModel, llama: Path) -> None:
    """What was computed of a beginning when memory ran out is computed once more; tokens are those of plain transformers."""
    rows = [work_row(index, "one beginning for all " + "ab" * index, max_new_tokens=9) for index in range(6)]
    messages = attempt_with(cramped_model, llama, rows)
    assert {row: result.text for row, result in results_of(messages).items()} == {
        row.row: plain_greedy(llama, str(row.prompt), 9) for row in rows
    }
    measured = only(messages, Finished).measured
    assert measured["memory_halvings"] >= 1
    assert measured["shared_prompt_tokens"] > 0


def test_a_row_that_never_fits_gets_an_error(cramped_model: LoadedModel, llama: Path) -> None:
    """A row that runs out of memory alone fails alone."""
    rows = [work_row(0, "x" * 70), *(work_row(index, "hello", max_new_tokens=3) for index in (1, 2, 3))]
    found = results_of(attempt_with(cramped_model, llama, rows))
    assert found[0].error is not None
    assert found[0].error.code == "generation_failed"
    assert all(found[index].error is None for index in (1, 2, 3))


def attempt_with(model: LoadedModel, folder: Path, rows: list[Any]) -> list[Message]:
    """The messages of an attempt on this very model."""
    messages: list[Message] = []
    command = make_command(folder, rows)
    attempt = Attempt(command, messages.append, Pulse(messages.append, threading.Event()))
    messages.append(attempt.run(model, AppliedPasses(())))
    return messages


def test_what_is_not_a_number_fails_its_rows_alone(llama: Path) -> None:
    """A row whose logits are not numbers gets an error; its neighbours are answered."""
    model = generic.load(make_command(llama, [work_row(0, "x")]), nothing)

    def spoil(_module: Any, _arguments: Any, output: Any) -> Any:
        output.logits[:, 0] = torch.nan
        return output

    hook = model.module.register_forward_hook(spoil)
    found = results_of(attempt_with(model, llama, [work_row(0, "hi", max_new_tokens=1), work_row(1, "hello", max_new_tokens=1)]))
    hook.remove()
    assert found[0].error is not None
    assert found[1].error is None


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: not enough memory: you tried…"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
)
def test_a_lack_of_memory_is_recognised(error: BaseException, is_one: bool) -> None:
    """Errors of torch's allocators count as a lack of memory, others do not."""
    assert is_out_of_memory(error) is is_one


def test_a_model_that_does_not_load_fails_the_attempt(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """Broken or missing weights are reported as a failed load, and the engine goes on with other models."""
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    rows = [work_row(0, "hello", max_new_tokens=2)]
    for content, code in ((b"not a header", "load_failed"), (b"\x08\0\0\0\0\0\0\0{}      ", "weights_missing")):
        (broken / "model.safetensors").write_bytes(content)
        failure = only(run(engine, make_command(broken, rows)), AttemptFailed)
        assert (failure.stage, failure.code) == ("loading", code)
    assert set(results_of(run(engine, make_command(llama, rows)))) == {0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "from-the-future", "architectures": ["FutureForCausalLM"]}, "a model of type from-the-future"),
        ({"model_type": None}, "a model of type None"),
        ({"model_type": "t5"}, "a model of type t5 that is causal-lm"),
    ],
)
def test_an_architecture_that_transformers_does_not_know_is_told(
    engine: Engine, llama: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """The failure names the type and the version of transformers, before anything is loaded."""
    folder = tmp_path / "unknown"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    failure = only(run(engine, make_command(folder, [work_row(0, "hello")])), AttemptFailed)
    assert (failure.stage, failure.code) == ("loading", "architecture_unknown")
    assert words in failure.message
    assert transformers.__version__ in failure.message


def test_loading_reports_that_it_is_alive(llama: Path) -> None:
    """The first message of a load is progress, before the model is there."""
    messages = run(Engine(), make_command(llama, [work_row(0, "hello", max_new_tokens=2)]))
    kinds = [type(message) for message in messages]
    assert kinds[0] is Progress
    assert kinds.index(Loaded) < kinds.index(BatchStarted)


def test_long_work_reports_at_most_once_a_second() -> None:
    """Work that beats often reports once a second, with the stage and the tokens so far."""
    times = iter([0.0, 0.5, 1.0, 1.2, 1.9, 2.1])
    messages: list[Message] = []
    pulse = Pulse(messages.append, threading.Event(), clock=lambda: next(times))
    pulse.stage = "generating"
    for tokens in range(5):
        pulse.tokens = tokens
        pulse()
    assert messages == [Progress(stage="generating", tokens=1), Progress(stage="generating", tokens=4)]
