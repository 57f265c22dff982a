"""Are only the experts read that the router asks for, and are the tokens those of the whole model?"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ollm_service.core.passes import Applied, Failed, NotNeeded
from ollm_service.core.plan import PassId
from ollm_service.core.wire import AttemptFailed, Execute, Finished
from tests.families import make
from tests.runner.commands import answers, first_outcomes, make_command, only, results_of, run, work_row
from tests.runner.models import plain_greedy
from tests.runner.test_weights import ORIGIN, flip_a_bit, nothing, weights_folder
from workers.runner.backends import generic
from workers.runner.engine import Engine
from workers.runner.weights.extents import ExtentFile, ExtentWriter
from workers.runner.weights.parts import experts_of
from workers.runner.weights.routing import ExpertReader, ExpertTraffic, RoutedExperts, _computed_tokens, eager_code
from workers.runner.weights.streaming import LayerStream

OFFLOAD, ROUTING = PassId.CPU_OFFLOAD, PassId.MOE_ROUTING
PROMPTS = ["one two", "a somewhat longer prompt, so that rows are padded", "3"]
NEW_TOKENS = 8


def command(
    model: Path,
    cache: Path,
    layers: tuple[int, ...],
    passes: tuple[PassId, ...] = (OFFLOAD, ROUTING),
    prompts: list[str] = PROMPTS,
) -> Execute:
    """Answer the prompts with these layers coming from disk."""
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(prompts)]
    return make_command(model, rows, passes=passes, cache_dir=cache, disk_layers=layers, micro_batch=3)


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-next", "gpt-oss", "mixtral"])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (2,)])
def test_routed_experts_keep_the_tokens(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path, family: str, layers: tuple[int, ...]
) -> None:
    """Rows get the tokens of plain transformers, while fewer experts come than there are, and as many bytes as were hit."""
    model = families(family)
    messages = run(engine, command(model, tmp_path, layers))
    found = {row: result.text for row, result in results_of(messages).items()}
    assert found == {index: plain_greedy(model, prompt, NEW_TOKENS) for index, prompt in enumerate(PROMPTS)}
    outcome, measured = first_outcomes(messages)[ROUTING], only(messages, Finished).measured
    assert isinstance(outcome, Applied)
    assert "experts hit" in outcome.evidence
    assert 0 < measured["experts_hit"] <= NEW_TOKENS * len(layers) * 4
    assert measured["expert_bytes_routed_ideal"] <= measured["expert_bytes_read"]
    assert measured["expert_bytes_routed_ideal"] < measured["expert_bytes_all"]


def test_a_token_reads_the_experts_that_it_visits(engine: Engine, families: Callable[[str], Path], tmp_path: Path) -> None:
    """Of one row every pass but the prompt's hits exactly as many experts of each layer as a token visits."""
    messages = run(engine, command(families("qwen3-moe"), tmp_path, (0, 1, 2, 3), prompts=["x"]))
    measured = only(messages, Finished).measured
    prompt = measured["experts_hit"] - (NEW_TOKENS - 1) * 4 * 2
    assert 4 * 2 <= prompt <= 4 * 4
    a_share = measured["experts_hit"] / (NEW_TOKENS * 4 * 4)
    assert measured["expert_bytes_routed_ideal"] == pytest.approx(measured["expert_bytes_all"] * a_share)


def test_without_the_pass_layers_come_whole(engine: Engine, families: Callable[[str], Path], tmp_path: Path) -> None:
    """The same model, warm: with the pass fewer bytes are read, without it all of every layer, and the answers stay."""
    model = families("qwen3-moe")
    routed = run(engine, command(model, tmp_path, (0, 1), prompts=["x"]))
    whole = run(engine, command(model, tmp_path, (0, 1), passes=(OFFLOAD,), prompts=["x"]))
    again = run(engine, command(model, tmp_path, (0, 1), prompts=["x"]))
    assert results_of(routed) == results_of(whole) == results_of(again)
    read = [only(messages, Finished).measured["weight_bytes_read"] for messages in (routed, whole)]
    assert read[0] < read[1]


@pytest.mark.parametrize(("family", "layers"), [("qwen3-moe", ()), ("llama", (0, 1))])
def test_routing_is_not_needed_where_no_expert_leaves(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path, family: str, layers: tuple[int, ...]
) -> None:
    """All layers in memory, or streamed ones without experts."""
    outcome = first_outcomes(run(engine, command(families(family), tmp_path, layers)))[ROUTING]
    assert outcome == NotNeeded(reason="no layer off the device has experts" if layers else "every expert is in memory")


def test_experts_that_cannot_be_told_apart_fail_the_pass(engine: Engine, families: Callable[[str], Path], tmp_path: Path) -> None:
    """A profile that tells of experts, and a model whose modules are not known to have any."""
    order = command(families("llama"), tmp_path, (0, 1))
    messages = run(engine, replace(order, profile=replace(order.profile, expert_count=4)))
    outcome = messages[-1].outcomes[ROUTING]  # type: ignore[union-attr]
    assert isinstance(outcome, Failed)
    assert "cannot be told apart" in outcome.reason


def test_a_damaged_expert_ends_the_attempt_and_not_the_next(families: Callable[[str], Path], tmp_path: Path) -> None:
    """An expert is read into a wrong bit: no row is answered with it; the next attempt lays the weights out again."""
    order = command(families("qwen3-moe"), tmp_path, (0, 1, 2, 3))
    right = answers(Engine(), order)
    size = (weights_folder(order) / "weights.extents").stat().st_size
    for expert in range(1, 5):
        flip_a_bit(weights_folder(order), at=size - expert * 4096)
    engine = Engine()
    failed = only(run(engine, order), AttemptFailed)
    assert (failed.code, failed.stage) == ("weights_corrupt", "generating")
    assert answers(engine, order) == right


def test_layers_in_host_memory_bring_routed_experts_only(engine: Engine, families: Callable[[str], Path], tmp_path: Path) -> None:
    """Layers that are kept in host memory, and such from disk beside them, route alike."""
    order = command(families("gpt-oss"), tmp_path, (2, 3))
    mixed = replace(order, placement=replace(order.placement, host_layers=(0, 1)))
    assert answers(engine, mixed) == answers(engine, command(families("gpt-oss"), tmp_path, ()))
    stream = generic.load(mixed, lambda: None).stream
    assert stream is not None
    assert set(stream.host) == {"model.layers.0", "model.layers.1"}


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-next", "gpt-oss", "mixtral", "deepseek-v3"])
def test_stacked_experts_are_found(family: str) -> None:
    """One module of experts in each layer that has some, with code of transformers' own that computes them."""
    model = make(family)
    found = [experts_of(model, f"model.layers.{layer}") for layer in range(4)]
    dense = 1 if family == "deepseek-v3" else 0
    assert [len(modules) for modules in found] == [0] * dense + [1] * (4 - dense)
    assert all(eager_code(inner) is not None for modules in found for inner in modules.values())


def test_half_precision_computes_few_numbers_of_tokens() -> None:
    """At most a third more tokens than there are, and at most four numbers for each power of two; up to four, just as many."""
    numbers = [_computed_tokens(count) for count in range(1, 1025)]
    assert all(count <= number <= count * 4 / 3 for count, number in enumerate(numbers, start=1))
    assert numbers[:4] == [1, 2, 3, 4]
    assert len(set(numbers)) <= 4 * 10
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_routed_experts_in_half_precision_make_the_same_numbers(tmp_path: Path, family: str) -> None:
    """Tokens that were added for the sake of a compiled product are left out again: the sums are those of eager code."""
    torch.manual_seed(0)
    model = make(family, torch.bfloat16)
    ((owner, inner),) = experts_of(model, "model.layers.0").items()
    writer = ExtentWriter(tmp_path, ORIGIN)
    for number in range(4):
        parts = [(f"{owner}.{name}", kept[number : number + 1]) for name, kept in inner.named_parameters()]
        writer.append(f"{owner}/{number}", parts, nothing, number)
    writer.finish()
    writer.close()
    source = ExtentFile(tmp_path, ORIGIN)
    stream = LayerStream([], source, torch.device("cpu"), {})
    extents = source.slices[owner]
    reader = ExpertReader(stream, max(extent.size for extent in extents))
    hidden, weights = torch.randn(21, 16, dtype=torch.bfloat16), torch.rand(21, 2, dtype=torch.bfloat16)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(21)])
    with torch.inference_mode():
        expected = eager_code(inner)(inner, hidden, chosen, weights)
        traffic = ExpertTraffic()
        found = RoutedExperts(inner, extents, reader.bring, torch.device("cpu"), traffic)(hidden, chosen, weights)
    torch.testing.assert_close(found, expected)
    assert (traffic.hit, traffic.there) == (4, 4)
    reader.close()
    source.close()
