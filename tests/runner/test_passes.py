"""How do passes end, and what do they leave behind? Evidence from real forward passes, and no file."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.packing import BLOCK_TOKENS
from ollm_service.core.passes import Applied, Failed, NotNeeded, describe
from ollm_service.core.plan import PassId
from ollm_service.core.wire import BatchDone, BatchStarted, Execute, Finished, Message, SpecializationFailed
from tests.runner.commands import chat_row, first_outcomes, make_command, of_kind, only, results_of, run, texts, work_row
from tests.runner.media_models import image_part
from workers.runner.backends import generic
from workers.runner.engine import Engine
from workers.runner.passes.mlp_chunking import MlpChunking

DISK, CHUNKS = PassId.DISK_CACHE, PassId.MLP_CHUNKING
# Of the small llama: 2 layers, keys and values, 2 key heads of 8 floats.
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4


def paged_command(
    model: Path,
    rows: Sequence[WorkRow],
    cache_dir: Path | None,
    *,
    passes: Sequence[PassId] = (DISK,),
    chunk_rows: int | None = None,
) -> Execute:
    """A plan with the cache in files."""
    return make_command(model, rows, passes=passes, kv=KVCacheStrategy.PAGED, cache_dir=cache_dir, chunk_rows=chunk_rows)


def test_disk_cache_counts_every_byte_it_writes(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """The evidence is the prompt's keys and values to the byte; the few tokens generated since stay in memory."""
    messages = run(engine, paged_command(llama, [work_row(0, "x" * 299, max_new_tokens=5)], tmp_path))
    written = 300 * BYTES_PER_TOKEN
    assert first_outcomes(messages)[DISK] == Applied(evidence=f"{written:,} bytes written in 6 pages")
    measured = only(messages, Finished).measured
    assert measured["kv_bytes_written"] == written
    # Each later token reads everything back once.
    assert measured["kv_bytes_read"] == 4 * written


def test_disk_cache_leaves_no_file(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """While a micro-batch runs its pages lie in a private folder; afterwards the cache folder is empty."""
    folders: list[list[Path]] = []

    def look(_message: Message) -> None:
        folders.append(list(tmp_path.iterdir()))

    engine.execute(paged_command(llama, [work_row(0, "hello", max_new_tokens=3)], tmp_path), look, threading.Event())
    assert max(map(len, folders)) == 1
    assert not folders[-1], "whoever hears the last message finds the files gone"


def test_disk_cache_is_not_needed_in_memory(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """Where the placement keeps the cache in memory the pass is not needed, and makes no folder."""
    messages = run(engine, make_command(llama, [work_row(0, "hello", max_new_tokens=3)], passes=(DISK,), cache_dir=tmp_path))
    assert isinstance(first_outcomes(messages)[DISK], NotNeeded)
    assert not list(tmp_path.iterdir())


def test_disk_cache_fails_before_any_row(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """A cache folder that cannot be made fails the pass before a row is in flight; the other pass was given up for it."""
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    command = paged_command(llama, [work_row(0, "hello")], in_the_way, passes=(CHUNKS, DISK))
    messages = run(engine, command)
    failure = only(messages, SpecializationFailed)
    assert isinstance(failure.outcomes[DISK], Failed)
    assert isinstance(failure.outcomes[CHUNKS], NotNeeded)
    assert failure.reason.startswith("disk-cache: ")
    assert failure.error_type == "FileExistsError"
    assert not of_kind(messages, BatchStarted)


def test_disk_cache_needs_a_folder(engine: Engine, llama: Path) -> None:
    """Without a cache folder the pass fails."""
    command = paged_command(llama, [work_row(0, "hello")], None)
    assert only(run(engine, command), SpecializationFailed).error_type == "NoCacheFolder"


def test_chunks_are_counted(engine: Engine, llama: Path) -> None:
    """The evidence counts the chunks of split passes only: here the prompt's 20 rows in 3 chunks for each of 2 layers."""
    command = make_command(llama, [work_row(0, "x" * 19, max_new_tokens=4)], passes=(CHUNKS,), chunk_rows=8)
    messages = run(engine, command)
    assert first_outcomes(messages)[CHUNKS] == Applied(evidence="6 chunks of at most 8 rows")
    assert only(messages, Finished).measured["mlp_chunks"] == 6


def test_chunks_adapt_to_free_memory_and_stay_as_large_as_a_block(llama: Path) -> None:
    """With no memory to spare an MLP still computes what the placement has counted at a time; with enough, all rows at once."""
    model = generic.load(make_command(llama, [work_row(0, "x")]), lambda: None)
    mlp_rows = torch.randn(1, 2 * BLOCK_TOKENS + 5, model.module.config.hidden_size)
    for free, expected in ((2**20, "3 chunks of at most 1,024 rows"), (2**40, "the largest forward pass had 2,053 rows")):
        chunking = MlpChunking(model, make_command(llama, [work_row(0, "x")], passes=(CHUNKS,)), {model.device: free}.get)
        chunking.apply()
        model.module.get_submodule("model.layers.0.mlp")(mlp_rows)
        assert expected in describe(chunking.evidence())
        chunking.undo()


@pytest.mark.parametrize("chunk_rows", [64, None])
def test_chunks_are_not_needed_for_few_rows(engine: Engine, llama: Path, chunk_rows: int | None) -> None:
    """Where one chunk holds every forward pass nothing was chunked, and the reason says how many rows there were."""
    command = make_command(llama, [work_row(0, "x" * 19, max_new_tokens=4)], passes=(CHUNKS,), chunk_rows=chunk_rows)
    outcome = first_outcomes(run(engine, command))[CHUNKS]
    assert isinstance(outcome, NotNeeded)
    assert "20 rows" in outcome.reason


def test_chunking_fails_without_a_gated_mlp(engine: Engine, model_dirs: dict[str, Path]) -> None:
    """GPT-2 has no gated MLP, so the pass fails and no row is answered."""
    messages = run(engine, make_command(model_dirs["gpt2"], [work_row(0, "hello")], passes=(CHUNKS,)))
    assert only(messages, SpecializationFailed).outcomes[CHUNKS] == Failed(
        reason="the model has no gated MLP", error_type="NoGatedMlp"
    )
    assert not of_kind(messages, BatchDone)


def test_layers_beside_those_that_were_pinned_are_brought_by_gpu_offload(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """The user says how many stay; that pass, and not cpu-offload, shows the others, with the processor as the device."""
    rows = [work_row(0, "x", max_new_tokens=4)]
    passes = (PassId.CPU_OFFLOAD, PassId.GPU_OFFLOAD)
    command = make_command(llama, rows, passes=passes, cache_dir=tmp_path, disk_layers=(1,))
    messages = run(engine, replace(command, config=RuntimeConfig(offload_gpu_layers=1)))
    outcomes = first_outcomes(messages)
    assert outcomes[PassId.CPU_OFFLOAD] == NotNeeded(reason="the layers are brought by the other offload pass")
    shown = outcomes[PassId.GPU_OFFLOAD]
    assert isinstance(shown, Applied)
    assert shown.evidence.startswith("layers 1 from disk; brought 4 times, ")
    assert results_of(messages) == results_of(run(engine, make_command(llama, rows)))


def test_a_pass_with_nothing_to_do_ends_as_not_needed(engine: Engine, llama: Path) -> None:
    """A planned pass is a preference: where nothing calls for it, the rows are answered without it, and it says so."""
    absent = (PassId.CPU_OFFLOAD, PassId.GPU_OFFLOAD, PassId.MOE_ROUTING, PassId.ATTENTION_REPLACEMENT, PassId.GDS_EXPORT_WEIGHTS)
    messages = run(engine, make_command(llama, [work_row(0, "x")], passes=absent))
    outcomes = first_outcomes(messages)
    assert list(outcomes) == list(absent)
    assert outcomes[PassId.CPU_OFFLOAD] == NotNeeded(reason="no layer to offload")
    assert all(isinstance(outcome, NotNeeded) and outcome.reason for outcome in outcomes.values())
    assert results_of(messages) == results_of(run(engine, make_command(llama, [work_row(0, "x")])))


@pytest.mark.parametrize(
    ("pass_id", "config"),
    [
        (PassId.CPU_OFFLOAD, RuntimeConfig(offload_cpu_layers=1)),
        (PassId.GPU_OFFLOAD, RuntimeConfig(offload_gpu_layers=1)),
        (PassId.MULTIMODAL_SHELL, RuntimeConfig()),
    ],
)
def test_a_pass_that_was_demanded_fails_where_it_has_nothing_to_act_on(
    engine: Engine, llama: Path, pass_id: PassId, config: RuntimeConfig
) -> None:
    """Layers that the user wanted elsewhere, or images for a model that has no place for them, cannot be done without."""
    command = replace(make_command(llama, [chat_row(0, [image_part(b"x")])], passes=(pass_id,)), config=config)
    failure = only(run(engine, command), SpecializationFailed)
    assert isinstance(failure.outcomes[pass_id], Failed)


def test_passes_leave_the_warm_model_as_it_was(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """After a specialized plan a generic one runs on the same warm model and writes and chunks nothing."""
    rows = [work_row(0, "x" * 30, max_new_tokens=4)]
    special = run(engine, paged_command(llama, rows, tmp_path, passes=(DISK, CHUNKS), chunk_rows=4))
    plain = run(engine, make_command(llama, rows))
    assert results_of(special) == results_of(plain)
    assert not {"mlp_chunks", "kv_bytes_written"} & set(only(plain, Finished).measured)


def test_a_plan_whose_rows_are_all_refused_needs_no_pass(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """Where no row can run, every planned pass ends as not needed."""
    messages = run(engine, paged_command(llama, [work_row(0, None)], tmp_path, passes=(DISK, CHUNKS)))
    assert first_outcomes(messages) == {pass_id: NotNeeded(reason="no row could run") for pass_id in (DISK, CHUNKS)}


def test_attention_is_replaced_where_transformers_computes_all_scores(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path
) -> None:
    """GPT-OSS: one call for each layer of each pass, and the tokens of transformers' own attention. A llama needs none of it."""
    pass_id = PassId.ATTENTION_REPLACEMENT
    rows = [work_row(index, "x" * (30 + index), max_new_tokens=4) for index in range(3)]
    messages = run(engine, make_command(families("gpt-oss"), rows, passes=(pass_id,)))
    measured = only(messages, Finished).measured
    assert measured["attention_calls"] == 4 * measured["passes"]
    assert str(first_outcomes(messages)[pass_id]).count("calls in place of transformers' attention") == 1
    plain = texts(engine, make_command(families("gpt-oss"), rows))
    assert {row: result.text for row, result in results_of(messages).items()} == plain
    outcome = first_outcomes(run(engine, make_command(families("llama"), rows, passes=(pass_id,))))[pass_id]
    assert isinstance(outcome, NotNeeded)
