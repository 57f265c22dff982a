"""Which laws hold for every estimate of memory, whatever the model and the layout?"""

from dataclasses import replace
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from ollm_service.core.estimates import MemoryEstimate, estimate_memory
from ollm_service.core.layout import Layout
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.passing import DEVICE_SLOTS
from ollm_service.core.plan import GenericModelKind
from ollm_service.core.profile import ModelProfile
from tests.property import strategies as some

MODEL_TYPES = ["llama", "gemma3_text", "gpt_oss", "qwen3_moe", "gpt2", "deepseek_v3", "bloom", "t5", None]


@st.composite
def models(draw: st.DrawFn) -> ModelProfile:
    """A model whose parts are parts: no layer weighs more than the whole, and its experts are layers' own."""
    layers = draw(st.lists(st.integers(1, 2**28), min_size=1, max_size=6).map(tuple))
    return replace(
        draw(some.profiles),
        model_type=draw(st.sampled_from(MODEL_TYPES)),
        layer_bytes=layers,
        layer_count=len(layers),
        weight_bytes=sum(layers) + draw(st.integers(0, 2**30)),
    )


layouts = st.builds(
    Layout,
    device_kind=st.sampled_from(["cpu", "cuda", "mps"]),
    kv=st.sampled_from(KVCacheStrategy),
    window_tokens=st.integers(1, 4096),
    mlp_rows=st.none() | st.integers(1, 2**15),
    is_sampled=st.booleans(),
    is_packed=st.booleans(),
    is_routed=st.booleans(),
    vocabulary_on_disk=st.booleans(),
)
rows_of = st.integers(1, 64)
lengths = st.integers(1, 2**17)


def grows(less: MemoryEstimate, more: MemoryEstimate) -> bool:
    """Whether nothing that has to be free became less."""
    return all(getattr(less, what) <= getattr(more, what) for what in ("device_bytes", "host", "disk"))


@given(models(), layouts, rows_of, lengths, lengths, st.integers(1, 64), st.integers(1, 2**12))
def test_more_to_do_never_needs_less(
    model: ModelProfile, layout: Layout, rows: int, prompt: int, answer: int, more_rows: int, more: int
) -> None:
    """More rows, longer answers, longer prompts: each needs at least as much of the device, of host memory and of the disk."""

    def needs(rows: int, prompt: int, answer: int) -> MemoryEstimate:
        return estimate_memory(model, layout, rows=rows, tokens=prompt + answer, prompt_tokens=prompt)

    base = needs(rows, prompt, answer)
    assert grows(base, needs(rows + more_rows, prompt, answer))
    assert grows(base, needs(rows, prompt, answer + more))
    assert grows(base, needs(rows, prompt + more, answer))


@given(models(), layouts, rows_of, st.integers(2, 2**17), st.data())
def test_a_known_prompt_never_needs_more(
    model: ModelProfile, layout: Layout, rows: int, tokens: int, data: st.DataObject
) -> None:
    """Knowing how much of a row is prompt only takes away; an encoder's source may count otherwise than its answer."""
    assume(model.kind is not GenericModelKind.SEQ2SEQ_LM)
    prompt = data.draw(st.integers(1, tokens))
    known = estimate_memory(model, layout, rows=rows, tokens=tokens, prompt_tokens=prompt)
    assert grows(known, estimate_memory(model, layout, rows=rows, tokens=tokens))


@given(models(), layouts, rows_of, lengths, st.data())
def test_layers_that_leave_need_no_more_of_the_device_than_their_slots(
    model: ModelProfile, layout: Layout, rows: int, tokens: int, data: st.DataObject
) -> None:
    """Each layer that leaves takes its weight away; what it costs is the slots through which such layers pass, no more."""
    total = model.layer_count
    count = data.draw(st.integers(1, total))
    layout = replace(layout, is_routed=False, vocabulary_on_disk=False)
    whole = estimate_memory(model, layout, rows=rows, tokens=tokens)
    for where in ("host_layers", "disk_layers"):
        changes: dict[str, Any] = {where: tuple(range(count))}
        found = estimate_memory(model, replace(layout, **changes), rows=rows, tokens=tokens)
        slots = DEVICE_SLOTS * max(model.layer_bytes[:count])
        assert found.weights == whole.weights - sum(model.layer_bytes[:count]) + slots
        assert found.device_bytes - found.weights == whole.device_bytes - whole.weights
        assert found.host >= whole.host


@given(models(), layouts, rows_of, lengths)
def test_files_need_no_more_disk_when_they_are_packed(model: ModelProfile, layout: Layout, rows: int, tokens: int) -> None:
    """A KV cache in memory has no files; a ring's are at most as large as all pages."""

    def disk(strategy: KVCacheStrategy) -> int:
        return estimate_memory(model, replace(layout, kv=strategy), rows=rows, tokens=tokens).disk

    assert disk(KVCacheStrategy.RESIDENT) == 0
    assert disk(KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER) <= disk(KVCacheStrategy.PAGED)


@given(models(), layouts, rows_of, lengths)
def test_greedy_rows_never_need_more_than_sampling(model: ModelProfile, layout: Layout, rows: int, tokens: int) -> None:
    """Sampling sorts what taking the best only looks through."""
    greedy, sampled = (
        estimate_memory(model, replace(layout, is_sampled=is_sampled), rows=rows, tokens=tokens) for is_sampled in (False, True)
    )
    assert grows(greedy, sampled)
