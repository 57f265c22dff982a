"""Does int8 hold its tolerance? A number within half a scale, small models' logits within a bound, and no row harms another."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.passes import Applied
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Finished
from tests.runner.commands import answers, first_outcomes, make_command, only, run, texts, work_row
from tests.runner.forcing import plain_logits, strategy_logits, tokens_of
from tests.runner.test_exactness import PROMPTS
from workers.runner.engine import Engine
from workers.runner.kv.quantized import Int8, dequantize, quantize
from workers.runner.kv.strategy import FileStrategy

DISK = PassId.DISK_CACHE
KV = KVCacheStrategy.QUANTIZED_COLD_TIER
# Of the small llama: 2 layers, keys and values, 2 key heads of 8 floats and a scale.
BYTES_PER_TOKEN = 2 * 2 * 2 * (8 + 4)
# Of a logit's error, the root of the mean square and the largest, in standard deviations of the logits: measured are 0.014 and
# 0.16 at most, with random weights, whose attention is sharper than that of most trained ones.
USUAL_ERROR, LARGEST_ERROR = 0.02, 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 100.0])
def test_a_number_comes_back_within_half_a_scale(dtype: torch.dtype, magnitude: float) -> None:
    """Beyond that is only the rounding of its own dtype; a scale is the largest magnitude of a token's head / 127."""
    torch.manual_seed(0)
    states = (torch.randn(3, 4, 200, 16) * magnitude * torch.rand(3, 4, 200, 1) ** 8).to(dtype)
    scales, integers = quantize(states)
    back = dequantize(scales, integers, dtype)
    assert (back.dtype, integers.dtype) == (dtype, torch.int8)
    exact, largest = states.double(), states.double().abs().amax(dim=-1, keepdim=True)
    assert torch.allclose(scales.double(), largest / 127, rtol=1e-6)
    info = torch.finfo(dtype)
    rounding = info.eps * exact.abs().clamp(min=info.smallest_normal)
    assert bool(((exact - back.double()).abs() <= scales.double() / 2 + rounding).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_smallest_and_largest_numbers_keep_their_size(dtype: torch.dtype) -> None:
    """Zeros stay zeros, numbers too small for a scale become zero or stay, and the largest one does not become infinite."""
    info = torch.finfo(dtype)
    states = torch.tensor([0.0, info.smallest_normal / 2**5, info.smallest_normal, info.max, info.min], dtype=dtype)
    back = dequantize(*quantize(states.view(5, 1, 1, 1)), dtype).flatten()
    assert bool(back.isfinite().all())
    assert bool(
        ((states.double() - back.double()).abs() <= torch.finfo(torch.float32).tiny + info.eps * states.double().abs()).all()
    )
    assert back[0] == 0


def test_what_is_not_finite_is_never_made_finite() -> None:
    """The whole token of that row and head comes back as not a number; everything else as it was."""
    states = torch.randn(2, 2, 3, 4)
    spoilt = states.clone()
    spoilt[0, 1, 2, 3], spoilt[1, 0, 0, 0], spoilt[1, 1, 1, 2] = torch.nan, torch.inf, -torch.inf
    expected = dequantize(*quantize(states), torch.float32)
    for row, head, token in ((0, 1, 2), (1, 0, 0), (1, 1, 1)):
        expected[row, head, token] = torch.nan
    assert torch.equal(dequantize(*quantize(spoilt), torch.float32).nan_to_num(7.0), expected.nan_to_num(7.0))


def test_evidence_counts_the_bytes_before_and_after(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """A byte a number and a scale for each token of a head, to the byte; the tail is neither written nor quantized."""
    messages = run(
        engine, make_command(llama, [work_row(0, "x" * 299, max_new_tokens=5)], passes=(DISK,), kv=KV, cache_dir=tmp_path)
    )
    written = 300 * BYTES_PER_TOKEN
    evidence = f"{written:,} bytes written in 6 pages of int8, for {300 * 2 * 2 * 2 * 8 * 4:,} bytes of keys and values"
    assert first_outcomes(messages)[DISK] == Applied(evidence=evidence)
    measured = only(messages, Finished).measured
    assert (measured["kv_bytes_written"], measured["kv_bytes_read"]) == (written, 4 * written)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3", "qwen3-moe", "gpt-oss"])
def test_forced_logits_stay_within_the_tolerance(families: Callable[[str], Path], family: str) -> None:
    """Two rows, one of them padded, fed the same 30 tokens after their prompts: no logit strays by more than stated."""
    prompts, forced = (PROMPTS[1][:200], PROMPTS[6][:150]), PROMPTS[6][200:230]
    plain = plain_logits(families(family), prompts, forced)
    ours, _ = strategy_logits(families(family), prompts, forced, FileStrategy(encoding=Int8()))
    assert torch.allclose(ours[:, 0], plain[:, 0], atol=1e-4), "the prompt itself sees what was computed"
    assert not torch.allclose(ours[:, 1:], plain[:, 1:], atol=1e-4), "nothing was quantized"
    errors = (ours - plain)[:, 1:] / plain.std()
    assert float(errors.square().mean().sqrt()) <= USUAL_ERROR
    assert float(errors.abs().max()) <= LARGEST_ERROR


@pytest.mark.parametrize("micro_batch", [3, 8])
def test_rows_are_answered_as_alone(engine: Engine, llama: Path, tmp_path: Path, micro_batch: int) -> None:
    """Other rows, padding and where pages begin change nothing of what comes back, so no token changes either."""
    rows = [work_row(index, prompt, max_new_tokens=3 + 2 * index) for index, prompt in enumerate(PROMPTS)]
    found = [
        texts(engine, make_command(llama, rows, passes=(DISK,), kv=KV, cache_dir=tmp_path, micro_batch=size))
        for size in (1, micro_batch)
    ]
    assert found[0] == found[1]


def test_a_row_of_no_numbers_fails_alone(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """A character whose embedding is not finite fails its row, with the reason, and the others get their answers."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(llama, spoilt)
    weights = load_file(spoilt / "model.safetensors")
    weights["model.embed_tokens.weight"][tokens_of(llama, "#")] = torch.nan
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    rows = [work_row(index, prompt, max_new_tokens=4) for index, prompt in enumerate(("abc", "a#c", "cab and so on"))]
    found = answers(engine, make_command(spoilt, rows, passes=(DISK,), kv=KV, cache_dir=tmp_path / "cache"))
    error = found[1].error
    assert error is not None
    assert (error.code, error.message) == ("generation_failed", "The model computed something that is not a number.")
    right = texts(engine, make_command(llama, rows))
    assert {row: found[row].text for row in (0, 2)} == {row: right[row] for row in (0, 2)}
