"""Does a ring keep exactly the newest tokens, and does a new token attend to exactly those? Float32 throughout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ollm_service.core.layout import USUAL_WINDOW_TOKENS
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import Applied
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute, Finished
from tests.runner.commands import first_outcomes, make_command, only, results_of, run, texts, work_row
from tests.runner.forcing import plain_logits, strategy_logits, tokens_of
from tests.runner.models import plain_greedy
from tests.runner.test_exactness import PROMPTS
from workers.runner.engine import Engine
from workers.runner.kv.strategy import FileStrategy

DISK = PassId.DISK_CACHE
FAMILIES = ["llama", "qwen2", "gpt2", "gemma3", "qwen3-moe", "gpt-oss"]
# Of the small llama: 2 layers, keys and values, 2 key heads of 8 floats.
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4
NEW_TOKENS = 12


def ring_command(model: Path, cache_dir: Path, window: int | None, micro_batch: int = 8, new_tokens: int = NEW_TOKENS) -> Execute:
    """Answer the prompts with the cache in a ring."""
    rows = [work_row(index, prompt, max_new_tokens=new_tokens) for index, prompt in enumerate(PROMPTS)]
    kv = KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER
    command = make_command(model, rows, passes=(DISK,), kv=kv, cache_dir=cache_dir, micro_batch=micro_batch)
    return replace(command, config=RuntimeConfig(kv_cache_window_tokens=window))


def newest_only(window: int) -> Callable[[Tensor], Tensor]:
    """Hides all but the newest tokens of a mask [B, T]."""

    def hide(mask: Tensor) -> Tensor:
        hidden = mask.clone()
        hidden[:, :-window] = 0
        return hidden

    return hide


@pytest.mark.parametrize(
    ("family", "micro_batch"),
    [("llama", 1), ("llama", 3), ("llama", 8), ("qwen2", 8), ("gpt2", 3), ("gemma3", 8), ("qwen3-moe", 3), ("gpt-oss", 8)],
)
def test_a_window_longer_than_the_rows_keeps_the_tokens(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path, family: str, micro_batch: int
) -> None:
    """Rows that never fill the window get plain transformers' tokens in any company, and nothing is evicted."""
    messages = run(engine, ring_command(families(family), tmp_path, 301 + NEW_TOKENS, micro_batch))
    found = {row: result.text for row, result in results_of(messages).items()}
    assert found == {index: plain_greedy(families(family), prompt, NEW_TOKENS) for index, prompt in enumerate(PROMPTS)}
    assert only(messages, Finished).measured["kv_tokens_evicted"] == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [40, 151])
def test_exactly_the_newest_tokens_are_attended_to(families: Callable[[str], Path], family: str, window: int) -> None:
    """Logits are those of transformers with a mask that hides the rest from all that comes after the prompts.

    Three rows: one that fills the window, one of which padding is in the window at first, and one that is all in it for long.
    """
    prompts, forced = (PROMPTS[1][:150], PROMPTS[6][:115], PROMPTS[2]), PROMPTS[6][200:260]
    ours, traffic = strategy_logits(families(family), prompts, forced, FileStrategy(window=window))
    masked = plain_logits(families(family), prompts, forced, newest_only(window))
    assert torch.allclose(ours, masked, atol=1e-3 * float(masked.std()))
    for other in (window - 1, window + 1):
        unlike = plain_logits(families(family), prompts, forced, newest_only(other))
        assert not torch.allclose(ours, unlike, atol=1e-3 * float(masked.std())), f"{other} tokens would do as well"
    seen = sum(len(tokens_of(families(family), text)) for text in (prompts[0], forced))
    assert traffic.tokens_evicted >= seen - window


def test_a_window_of_one_token_attends_to_itself_alone(families: Callable[[str], Path]) -> None:
    """The smallest window there is."""
    ours, _ = strategy_logits(families("llama"), PROMPTS[:2], "some", FileStrategy(window=1))
    assert torch.allclose(ours, plain_logits(families("llama"), PROMPTS[:2], "some", newest_only(1)), atol=1e-4)


def test_rows_are_answered_as_alone(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """A window moves over each row's own newest tokens, whoever else is there, and rows that leave take nothing with them."""
    rows = [work_row(index, prompt, max_new_tokens=3 + 5 * index) for index, prompt in enumerate(PROMPTS)]
    commands = [replace(ring_command(llama, tmp_path, 30, size), rows=tuple(rows)) for size in (1, 3, 8)]
    alone, *together = [texts(engine, command) for command in commands]
    assert together == [alone, alone]
    assert alone != texts(engine, make_command(llama, rows)), "a short window changes answers"


def test_evidence_tells_what_was_written_and_evicted(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """Of a prompt of 301 tokens the newest 256 are written, in two layers; the 11 fed back after it do not fill a page."""
    messages = run(
        engine, replace(ring_command(llama, tmp_path, None), rows=(work_row(0, "x" * 300, max_new_tokens=NEW_TOKENS),))
    )
    assert USUAL_WINDOW_TOKENS == 256
    written, evicted = 256 * BYTES_PER_TOKEN, 2 * (301 + 11 - 256)
    evidence = f"{written:,} bytes written in 4 pages; the newest 256 tokens kept, {evicted:,} evicted in all layers"
    assert first_outcomes(messages)[DISK] == Applied(evidence=evidence)
    measured = only(messages, Finished).measured
    assert (measured["kv_tokens_evicted"], measured["kv_bytes_written"]) == (evicted, written)
    assert measured["kv_bytes_read"] == 11 * 256 * BYTES_PER_TOKEN
