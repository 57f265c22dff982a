"""Do KV caches in files keep their answers beside streamed layers, and after other models and jobs? Float32 throughout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import Applied
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from tests.runner.commands import first_outcomes, make_command, results_of, run, texts, work_row
from tests.runner.models import plain_greedy, save_model
from tests.runner.test_exactness import PROMPTS
from workers.runner.engine import Engine

DISK, OFFLOAD, CHUNKS = PassId.DISK_CACHE, PassId.CPU_OFFLOAD, PassId.MLP_CHUNKING
IN_FILES = (
    KVCacheStrategy.PAGED,
    KVCacheStrategy.QUANTIZED_COLD_TIER,
    KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER,
)
NEW_TOKENS = 6


def command(
    model: Path,
    cache_dir: Path,
    kv: KVCacheStrategy,
    *,
    layers: tuple[int, ...] = (),
    micro_batch: int = 3,
    chunk_rows: int | None = None,
) -> Execute:
    """Answer the prompts; a ring keeps 64 tokens."""
    passes = (DISK, *([OFFLOAD] if layers else []), *([CHUNKS] if chunk_rows else []))
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS + index) for index, prompt in enumerate(PROMPTS)]
    made = make_command(
        model,
        rows,
        passes=passes,
        kv=kv,
        cache_dir=cache_dir,
        disk_layers=layers,
        micro_batch=micro_batch,
        chunk_rows=chunk_rows,
    )
    is_ring = kv is KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER
    return replace(made, config=RuntimeConfig(kv_cache_window_tokens=64 if is_ring else None))


@pytest.mark.parametrize(
    ("family", "layers", "micro_batch", "chunk_rows"),
    [
        ("llama", (0, 1), 1, None),
        ("llama", (1,), 3, 7),
        ("llama", (0, 1), 8, 7),
        ("qwen2", (0,), 3, None),
        ("gpt2", (0, 1), 8, None),
        ("gemma3", (1, 2), 3, 16),
        ("qwen3-moe", (0, 1, 2, 3), 8, None),
        ("gpt-oss", (2, 3), 3, None),
    ],
)
def test_pages_beside_streamed_layers_keep_the_tokens(
    engine: Engine,
    families: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    layers: tuple[int, ...],
    micro_batch: int,
    chunk_rows: int | None,
) -> None:
    """Plain transformers' tokens, whatever comes from disk, and each pass shows what it did."""
    model = families(family)
    order = command(model, tmp_path, KVCacheStrategy.PAGED, layers=layers, micro_batch=micro_batch, chunk_rows=chunk_rows)
    messages = run(engine, order)
    found = {row: result.text for row, result in results_of(messages).items()}
    assert found == {index: plain_greedy(model, prompt, NEW_TOKENS + index) for index, prompt in enumerate(PROMPTS)}
    assert all(isinstance(outcome, Applied) for outcome in first_outcomes(messages).values())


@pytest.mark.parametrize("kv", IN_FILES[1:])
@pytest.mark.parametrize(("family", "micro_batch"), [("llama", 8), ("gemma3", 3), ("qwen3-moe", 1)])
def test_inexact_strategies_answer_alike_beside_streamed_layers(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path, kv: KVCacheStrategy, family: str, micro_batch: int
) -> None:
    """Where the weights come from changes nothing of what a strategy gives."""
    orders = [command(families(family), tmp_path, kv, layers=layers, micro_batch=micro_batch) for layers in ((), (0, 1))]
    whole, streamed = (texts(engine, order) for order in orders)
    assert whole == streamed


@pytest.mark.parametrize("kv", IN_FILES)
def test_models_and_jobs_follow_each_other(families: Callable[[str], Path], tmp_path: Path, kv: KVCacheStrategy) -> None:
    """Two models of one family in one runner, one of them twice: each answers as in a runner of its own."""
    first, second = families("llama"), save_model(tmp_path / "other", "llama", seed=7)
    engine = Engine()
    orders = [command(model, tmp_path / "cache", kv) for model in (first, first, second, first)]
    found = [texts(engine, order) for order in orders]
    assert found[0] == found[1] == found[3]
    assert found[2] == texts(Engine(), orders[2])
    assert found[2] != found[0]
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("kv", IN_FILES)
def test_a_strategy_leaves_nothing_to_the_next_job(engine: Engine, llama: Path, tmp_path: Path, kv: KVCacheStrategy) -> None:
    """After it the same warm model keeps its cache in memory again, with plain tokens."""
    texts(engine, command(llama, tmp_path, kv))
    resident = texts(engine, command(llama, tmp_path, KVCacheStrategy.RESIDENT))
    assert resident == {index: plain_greedy(llama, prompt, NEW_TOKENS + index) for index, prompt in enumerate(PROMPTS)}
