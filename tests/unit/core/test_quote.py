"""When would a job be done, by what was measured or by what devices are capable of?"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm_service.core.capabilities import Capabilities, Device, LiveState
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.placement import RowBounds, place
from ollm_service.core.plan import GenericModelKind, NativeFamily, PassId
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.quote import Ahead, Candidate, Job, Quote, RowSize, quote
from ollm_service.core.rates import PLAN_SECONDS, MeasuredAttempt, output_share, tokens_per_byte
from ollm_service.core.requirements import requirements_of
from ollm_service.core.resolution import HeldModel

GIB = 1024**3
CPU = Device(device_id="cpu", name="a CPU", memory_bytes=16 * GIB, memory_rate=10e9, arithmetic={"float32": 100e9})
PROFILE = ModelProfile(
    name="tiny",
    path=PurePosixPath("tiny"),
    digest="d" * 64,
    architecture="LlamaForCausalLM",
    family=NativeFamily.LLAMA,
    kind=GenericModelKind.CAUSAL_LM,
    dtype="float32",
    weight_bytes=400_000_000,
    layer_count=4,
    hidden_size=512,
    intermediate_size=2048,
    vocabulary_size=32_000,
    attention_heads=8,
    kv_bytes_per_token=16_384,
    max_context_tokens=4_096,
)
MEASURED = MeasuredAttempt(
    placement={"tier": "KV cache in files"},
    measured={
        "device": "a CPU",
        "backend": "optimized-native",
        "prefill_tokens": 1_000,
        "prefill_seconds": 2.0,
        "decode_tokens": 800,
        "decode_passes": 100,
        "decode_seconds": 10.0,
        "load_seconds": 3.0,
        "prompt_tokens": 1_000,
        "prompt_bytes": 4_000,
        "completion_tokens": 808,
        "allowed_tokens": 1_616,
    },
)


def worker(name: str, free: int = 8 * GIB, *, speed: float = 1.0, **changes: Any) -> Candidate:
    """A CPU worker that can do everything, so many times as fast."""
    device = replace(CPU, memory_rate=10e9 * speed, arithmetic={"float32": 100e9 * speed})
    offered = Capabilities(
        node=name,
        slots=1,
        devices=(device,),
        host_memory_bytes=16 * GIB,
        backends={"optimized-native": None, "transformers-generic": None},
        passes=dict.fromkeys(PassId),
        kv_strategies={"resident": None, "paged": None},
        models=(PROFILE,),
    )
    live = LiveState(device_free_bytes={"cpu": free}, host_free_bytes=free, cache_free_bytes=100 * GIB)
    return Candidate(name=name, capabilities=replace(offered, **changes), live=live)


def job(count: int = 1_000, rows_per_plan: int = 100) -> Job:
    """So many rows of 400 bytes with at most 32 new tokens."""
    planned = plan("tiny", [HeldModel(profile=PROFILE, workers=("w",))], RuntimeConfig())
    return Job(
        plan=planned.plan,
        profile=PROFILE,
        config=RuntimeConfig(),
        requirements=requirements_of(planned.plan, PROFILE, RuntimeConfig()),
        rows=[RowSize(prompt_bytes=400, max_new_tokens=32, is_sampled=False)] * count,
        rows_per_plan=rows_per_plan,
    )


def span(found: Quote) -> tuple[float, float, float]:
    """The range around the expectation."""
    assert found.seconds is not None
    assert found.fastest_seconds is not None
    assert found.slowest_seconds is not None
    return found.fastest_seconds, found.seconds, found.slowest_seconds


def test_tokens_and_outputs_are_guessed_until_they_are_measured() -> None:
    """Tokens of a byte: by the vocabulary's size, then as measured; the part of allowed tokens: unknown, then as measured."""
    assert tokens_per_byte([], PROFILE) == 0.25 == tokens_per_byte([MEASURED], PROFILE)
    assert tokens_per_byte([], replace(PROFILE, vocabulary_size=40)) == 1.0
    assert (output_share([]), output_share([MEASURED])) == (None, 0.5)


def test_a_quote_tells_how_much_how_fast_and_by_whom() -> None:
    """Twice as fast a worker gets twice the rows; the range holds the expectation; nothing was measured."""
    found = quote(job(3_000), [worker("fast", speed=2.0), worker("slow")], [])
    fast, slow = found.workers
    assert (found.row_count, found.prompt_tokens, found.most_output_tokens) == (3_000, 300_000, 96_000)
    assert fast.rows_an_hour == pytest.approx(2 * slow.rows_an_hour, rel=0.01)
    assert fast.share == pytest.approx(2 / 3, abs=0.04)
    assert fast.share + slow.share == pytest.approx(1)
    fastest, expected, slowest = span(found)
    assert fastest < expected < slowest
    assert not found.is_measured


def test_measured_quotes_are_closer_and_say_so() -> None:
    """By hand: 3 s of loading, a plan, and for each row 100 tokens at 500 a second and its part of 15 passes of 0.1 s."""
    found = quote(job(100), [worker("box")], [MEASURED])
    (box,) = found.workers
    assert box.placement is not None
    rows = min(box.placement.micro_batch, 100)
    passes = 15 * 0.1 * max(1.0, rows / 8) / rows
    assert found.seconds == pytest.approx(3 + 100 * (100 / 500 + passes) + PLAN_SECONDS)
    assert found.is_measured
    alike = replace(MEASURED, measured={**MEASURED.measured, "decode_tokens": 100 * rows})
    _, expected, slowest = span(quote(job(100), [worker("box")], [alike] * 50))
    assert slowest / expected < 1.5


def test_whoever_cannot_run_it_says_why_and_gets_nothing() -> None:
    """A worker without the backend, and one without room; alone, they leave the quote without a time."""
    without = worker("old", backends={"optimized-native": "torch is not installed"})
    full = worker("full", free=1_000)
    found = quote(job(10), [without, full], [])
    assert all(part.refused and part.share == 0 for part in found.workers)
    assert (found.seconds, found.unplaceable_rows) == (None, 10)
    helped = quote(job(10), [without, full, worker("able")], [])
    assert helped.seconds is not None
    assert [part.share for part in helped.workers] == [0, 0, 1]


def test_a_draft_model_takes_its_room_of_the_device() -> None:
    """A worker without the draft takes no part, and says so; one that has it has less room for the model."""
    draft = replace(PROFILE, name="draft", path=PurePosixPath("small/draft"), digest="e" * 64, weight_bytes=100_000_000)
    wanted = replace(job(), config=RuntimeConfig(draft_model="small/draft"))
    roomy = worker("roomy", models=(PROFILE, draft))
    with_draft, without = quote(wanted, [roomy, worker("other")], []).workers
    assert without.refused == ("the draft model small/draft is not in this worker's models folder",)
    assert with_draft.placement is not None
    assert quote(job(), [roomy], []).workers[0].free_bytes - with_draft.free_bytes > draft.weight_bytes
    tight = worker("tight", int(1.5 * GIB), models=(PROFILE, draft))
    alone, beside = (quote(asked, [tight], []).workers[0].placement for asked in (job(), wanted))
    assert alone is not None
    assert beside is not None
    assert beside.micro_batch < alone.micro_batch


def test_rows_too_long_for_a_worker_are_counted() -> None:
    """One row that no worker holds is told, and does not hide the rest."""
    long = replace(job(), rows=[*job(10).rows, RowSize(prompt_bytes=12_000, max_new_tokens=900)])
    found = quote(long, [worker("small", free=1_000_000_000)], [])
    (small,) = found.workers
    assert not small.refused
    assert found.unplaceable_rows == small.left_out_rows == 1


def test_the_longest_row_that_a_worker_holds_is_told() -> None:
    """Longer rows have no room there by themselves either; of a worker that holds all nothing is told."""
    sizes = range(200, 4_000, 100)
    rows = {size: RowSize(prompt_bytes=4 * (size - 32), max_new_tokens=32) for size in sizes}
    found = quote(replace(job(), rows=list(rows.values())), [worker("small", free=1_000_000_000), worker("large")], [])
    small, large = found.workers
    assert (large.longest_row_tokens, large.left_out_rows, found.unplaceable_rows) == (None, 0, 0)
    longest = small.longest_row_tokens
    assert longest is not None
    assert small.left_out_rows == sum(size > longest for size in sizes) > 0
    longer = quote(
        replace(job(), rows=[rows[size] for size in sizes if size > longest]), [worker("small", free=1_000_000_000)], []
    )
    assert longer.workers[0].refused


def test_a_quote_is_placed_by_the_bounds_that_a_worker_goes_by() -> None:
    """No worker counts tokens before it places a plan: fewer rows run at a time than their tokens would allow."""
    small, rows = worker("small", free=1_300_000_000), [RowSize(prompt_bytes=1_000, max_new_tokens=32)] * 100
    (found,) = quote(replace(job(), rows=rows), [small], []).workers
    bounds = RowBounds(longest=1_000 + 64 + 32, longest_prompt=1_000 + 64, count=100, are_sampled=False)
    same = replace(job(), rows=rows)
    placed = place(same.plan, PROFILE, same.config, same.requirements, small.capabilities, small.live, bounds)
    assert found.placement == placed


# ---------------------------------------------------------------------------------------- what comes first


def ahead(rows: int, *held: int, of: Job | None = None, plans: int = 3, attempts: Sequence[MeasuredAttempt] = ()) -> Ahead:
    """Plans of other jobs with so many queued rows, and those that each candidate holds."""
    return Ahead(job=of or job(64), attempts=attempts, plans=plans, queued_rows=rows, held_rows=held)


def seconds_of(found: Quote) -> float:
    """When it is expected to end."""
    assert found.seconds is not None
    return found.seconds


def test_plans_of_other_jobs_come_first() -> None:
    """A worker with the same plans queued before needs so much longer; those that it runs already count, too."""
    alone, queued, held = (
        quote(job(100), [worker("box")], [MEASURED], before)
        for before in ((), [ahead(300, 0, attempts=[MEASURED])], [ahead(200, 100, attempts=[MEASURED])])
    )
    begins = queued.workers[0].begins_seconds
    assert (alone.plans_ahead, queued.plans_ahead, held.plans_ahead) == (0, 3, 3)
    assert alone.workers[0].begins_seconds == 0
    assert begins is not None
    assert seconds_of(queued) == pytest.approx(begins + seconds_of(alone))
    assert begins == pytest.approx(3 + 300 * (seconds_of(alone) - 3) / 100)
    assert held.workers[0].begins_seconds == pytest.approx(begins), "a model that runs is loaded; another job loads it once"
    assert queued.is_measured
    fastest, expected, slowest = span(queued)
    assert fastest < expected < slowest


def test_others_wait_for_the_workers_that_they_can_use() -> None:
    """What only one worker can take keeps the other free; plans that nobody here can take do not come first."""
    only_west = replace(job(64), requirements=replace(job().requirements, where='node == "west"'))
    nowhere = replace(job(64), requirements=replace(job().requirements, where='node == "moon"'))
    workers = [worker("west"), worker("east")]
    found = quote(job(1_000), workers, [], [ahead(2_000, 0, 0, of=only_west), ahead(10**6, 0, 0, of=nowhere, plans=40)])
    west, east = found.workers
    assert (found.plans_ahead, found.plans_not_counted) == (3, 0)
    assert (west.share, west.begins_seconds, east.share, east.begins_seconds) == (0, None, 1, 0)
    elsewhere = quote(only_west, workers, [], [ahead(2_000, 0, 0, of=replace(only_west, requirements=nowhere.requirements))])
    assert elsewhere.plans_ahead == 0


def test_plans_of_unknown_speed_are_told_and_not_counted() -> None:
    """Where no worker's speed with another model is known, its plans may come first, but nobody knows how long they take."""
    strange = replace(PROFILE, dtype="float16")
    other = replace(job(64), profile=strange, requirements=requirements_of(job().plan, PROFILE, RuntimeConfig()))
    found = quote(job(100), [worker("box")], [MEASURED], [ahead(500, 7, of=other, plans=12)])
    assert (found.plans_ahead, found.plans_not_counted) == (0, 12)
    assert found.seconds == quote(job(100), [worker("box")], [MEASURED]).seconds


# ---------------------------------------------------------------------------------------- what would be faster


def test_a_slow_worker_that_would_hold_up_the_end_is_named() -> None:
    """It takes a plan because it is free, and needs longer for it than the others for all: the option leaves it out."""
    found = quote(job(20_000, 1_000), [worker("desktop", speed=10), worker("cpu-box", speed=0.02)], [])
    assert found.leave_out is not None
    assert (found.leave_out.nodes, found.leave_out.where) == (("cpu-box",), 'node != "cpu-box"')
    desktop, box = found.workers
    assert box.saves_seconds == pytest.approx(found.leave_out.seconds - seconds_of(found))
    assert desktop.saves_seconds is not None
    assert desktop.saves_seconds > 0
    asked = replace(job(20_000, 1_000).requirements, where='gpu_memory_gb >= 0 or zone == "a"')
    again = quote(replace(job(20_000, 1_000), requirements=asked), [worker("a", speed=10), worker("it's", speed=0.02)], [])
    assert again.leave_out is not None
    assert again.leave_out.where == '(gpu_memory_gb >= 0 or zone == "a") and node != "it\'s"'


def test_one_long_row_does_not_make_the_others_wait() -> None:
    """A submission gives it a plan of its own; the others run as many at a time as they do without it."""
    small, few = worker("small", free=1_300_000_000), job(1_000)
    without = quote(few, [small], [])
    with_it = quote(replace(few, rows=[*few.rows, RowSize(prompt_bytes=15_000, max_new_tokens=300)]), [small], [])
    batches = [found.workers[0].placement.micro_batch for found in (without, with_it) if found.workers[0].placement]
    assert batches[0] == batches[1] > 2
    assert without.seconds is not None
    assert with_it.seconds is not None
    assert without.seconds < with_it.seconds < 1.5 * without.seconds


@pytest.mark.parametrize(("usual_bytes", "long_bytes"), [(400, 14_000), (1_000, 12_000)])
def test_rows_are_dealt_only_to_workers_that_hold_them(usual_bytes: int, long_bytes: int) -> None:
    """However fast another is: the job cannot end before the slow one has done alone what nobody else has room for."""
    usual = [RowSize(prompt_bytes=usual_bytes, max_new_tokens=32)] * 500
    long = [RowSize(prompt_bytes=long_bytes, max_new_tokens=300)] * 500
    hasty, slow = worker("hasty", free=1_000_000_000, speed=10.0), worker("slow")
    both = quote(replace(job(), rows=[*usual, *long]), [hasty, slow], [])
    alone = quote(replace(job(), rows=long), [slow], [])
    assert (both.workers[0].left_out_rows, both.unplaceable_rows) == (500, 0)
    assert both.workers[0].share > 0
    assert both.workers[1].share >= 0.5
    assert both.seconds is not None
    assert alone.seconds is not None
    assert both.seconds >= 0.99 * alone.seconds


def test_an_answer_that_would_go_beyond_the_context_ends_there() -> None:
    """Such a row runs like any other; only a prompt that fills the context by itself has no room anywhere."""
    few = job(2)
    fits, full = RowSize(prompt_bytes=400, max_new_tokens=5_000), RowSize(prompt_bytes=4 * 4_096, max_new_tokens=1)
    found = quote(replace(few, rows=[fits, *few.rows]), [worker("any")], [])
    assert (found.unplaceable_rows, found.longest_row_tokens, found.workers[0].left_out_rows) == (0, 4_096, 0)
    assert found.seconds is not None
    assert quote(replace(few, rows=[full, *few.rows]), [worker("any")], []).unplaceable_rows == 1


def test_nobody_is_left_out_who_is_needed_or_only_imagined() -> None:
    """The one worker with room for the longest rows stays, however slow; of imagined machines nothing is said."""
    rows = [*[RowSize(prompt_bytes=400, max_new_tokens=32)] * 20_000, RowSize(prompt_bytes=12_000, max_new_tokens=900)]
    work = replace(job(rows_per_plan=1_000), rows=rows)
    small, slow = worker("small", free=1_000_000_000, speed=10), worker("slow", speed=0.02)
    assert quote(work, [small, slow], []).leave_out is None
    assert quote(replace(work, rows=rows[:-1]), [small, slow], []).leave_out is not None
    imagined = replace(worker("if h200", speed=10), is_hypothetical=True)
    told = quote(replace(work, rows=rows[:-1]), [imagined, slow], [])
    assert (told.leave_out, [part.saves_seconds for part in told.workers]) == (None, [None, None])


def test_what_the_labels_cost_is_told() -> None:
    """Where the job would end noticeably sooner on everybody, or could run on somebody at all, and no earlier than that."""
    workers = [worker("home", speed=0.1), worker("away", speed=2.0)]
    here = replace(job(20_000), requirements=replace(job().requirements, where='node == "home"'))
    told = quote(here, workers, [])
    assert told.seconds_anywhere == quote(job(20_000), workers, []).seconds
    assert seconds_of(told) > 2 * seconds_of(quote(job(20_000), workers, []))
    nowhere = replace(here, requirements=replace(here.requirements, where='node == "moon"'))
    assert quote(nowhere, workers, []).seconds is None
    assert quote(nowhere, workers, []).seconds_anywhere == told.seconds_anywhere
    fast = replace(here, requirements=replace(here.requirements, where='node == "away"'))
    assert quote(fast, workers, []).seconds_anywhere is None
    assert quote(job(20_000), workers, []).seconds_anywhere is None


@settings(max_examples=60)
@given(st.lists(st.floats(0.005, 10), min_size=2, max_size=5), st.integers(1_000, 30_000), st.sampled_from([1, 256, 1_000]))
def test_the_advice_never_makes_it_later(speeds: list[float], rows: int, rows_per_plan: int) -> None:
    """Who follows it gets just the end that it promised, noticeably before that without it, and nobody else is refused."""
    candidates = [worker(f"w{number}", speed=speed) for number, speed in enumerate(speeds)]
    work = job(rows, rows_per_plan)
    before = [ahead(500, *[0] * len(speeds))]
    found = quote(work, candidates, [], before)
    for part in found.workers:
        assert part.saves_seconds is None or part.share > 0
    if found.leave_out is None:
        return
    heeded = replace(work, requirements=replace(work.requirements, where=found.leave_out.where))
    after = quote(heeded, candidates, [], before)
    assert after.seconds == found.leave_out.seconds
    assert seconds_of(found) - seconds_of(after) >= max(300, 0.05 * seconds_of(found))
    assert {part.name for part in after.workers if part.refused} == set(found.leave_out.nodes)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(1, 2_000), st.integers(1, 256))
def test_every_row_is_dealt_to_somebody(speeds: list[float], rows: int, rows_per_plan: int) -> None:
    """Shares sum to one, and the range holds the expectation, whatever the fleet."""
    candidates = [worker(f"w{number}", speed=speed) for number, speed in enumerate(speeds)]
    found = quote(job(rows, rows_per_plan), candidates, [])
    assert sum(part.share for part in found.workers) == pytest.approx(1)
    fastest, expected, slowest = span(found)
    assert 0 < fastest <= expected <= slowest


def test_rows_that_draw_their_tokens_take_longer() -> None:
    """One that may is enough for a slower quote: logits are sorted for it."""
    greedy = job(100)
    mixed = replace(greedy, rows=[*greedy.rows[1:], replace(greedy.rows[0], is_sampled=True)])
    (best,), (drawn,) = (quote(work, [worker("box")], []).workers for work in (greedy, mixed))
    assert drawn.rows_an_hour < best.rows_an_hour
