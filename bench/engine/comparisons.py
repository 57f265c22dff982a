"""What is compared with what, and which ratio is each figure? The table of bench/README.md, line by line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.engine.made import COPYING, EXPERTS, LARGE, LLAMA, LONG
from bench.engine.ours import Measured, Setting
from bench.engine.work import (
    AT_A_TIME,
    PREFIX_OWN,
    PREFIX_ROWS,
    PREFIX_SHARED,
    fewest_passes,
    shared_work_ratio,
    work,
)

Pair = Mapping[str, Measured]


@dataclass(frozen=True, slots=True)
class Part:
    """A function of `ours.py` or `peers.py` that runs in a process of its own, and its arguments."""

    function: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A ratio, computed from the measurements of these parts of each pair; the figure is the median over the pairs."""

    parts: Sequence[str]
    ratio: Callable[[Pair], float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Parts that are run one right after the other, so many times, on one model, and the figures that they give."""

    model: str
    pairs: int
    parts: Mapping[str, Part]
    figures: Mapping[str, Figure]


def _ours(rows: str, model: str = LLAMA, at_a_time: int = AT_A_TIME, **options: Any) -> Part:
    return Part("ours", asdict(Setting(model=model, rows=rows, at_a_time=at_a_time, **options)))


def _peer(function: str, rows: str, at_a_time: int) -> Part:
    return Part(function, {"model": LLAMA, "rows": rows, "at_a_time": at_a_time})


def _decoding(rows: str, count: int, pairs: int) -> Comparison:
    key = f"streamed_decode_vs_accelerate_b{count}"
    return Comparison(
        model=LLAMA,
        pairs=pairs,
        parts={"ours": _ours(rows, at_a_time=count), "accelerate": _peer("accelerated", rows, count)},
        figures={key: Figure(("ours", "accelerate"), lambda pair: ratio(pair, "accelerate", "ours", "step_seconds"))},
    )


def ratio(pair: Pair, over: str, under: str, what: str) -> float:
    """One part's measurement over another's."""
    return pair[over][what] / pair[under][what]


def fraction_of_disk(pair: Pair) -> float:
    """Bytes of all layers by the seconds of a step, over the mean rate of the probes before and after."""
    probed = (pair["before"]["bytes_a_second"] + pair["after"]["bytes_a_second"]) / 2
    return pair["ours"]["layer_bytes"] / pair["ours"]["step_seconds"] / probed


def fraction_of_experts(pair: Pair, part: str) -> float:
    """Of the passes after the prompt's, which a run of the prompt alone tells apart; `part` is `read` or `routed_ideal`."""
    prompt, steps = pair["prompt"], pair["steps"]
    return (steps[f"expert_bytes_{part}"] - prompt[f"expert_bytes_{part}"]) / (
        steps["expert_bytes_all"] - prompt["expert_bytes_all"]
    )


def mixed_lengths_efficiency(pair: Pair, *, is_quick: bool = False) -> float:
    """The computed optimum of passes over those that were made. No guesses: a row gets a token a pass."""
    answers = [row.answer_tokens for row in work("job", is_quick=is_quick)]
    return fewest_passes(answers, AT_A_TIME) / pair["ours"]["passes"]


def tokens_a_second(measured: Measured) -> float:
    """Of a whole answer, its prompt's pass included."""
    return measured["answer_tokens"] / measured["seconds"]


def comparisons(*, is_quick: bool = False) -> Mapping[str, Comparison]:
    """All of them, those on one model next to each other."""
    return {**_streamed_steps(), **_in_memory(), **_streamed_job(is_quick), **_guesses(), **_bytes()}


def _streamed_steps() -> Mapping[str, Comparison]:
    return {
        "disk": Comparison(
            model=LLAMA,
            pairs=5,
            parts={"before": Part("disk", {"model": LLAMA}), "ours": _ours("1x128"), "after": Part("disk", {"model": LLAMA})},
            figures={"streamed_fraction_of_disk": Figure(("before", "ours", "after"), fraction_of_disk)},
        ),
        "32 rows": _decoding("32x128", 32, 5),
        "256 rows": _decoding("256x32", 256, 5),
    }


def _in_memory() -> Mapping[str, Comparison]:
    return {
        "shared beginning": Comparison(
            model=LLAMA,
            pairs=5,
            parts={
                "shared": _ours("shared", is_streamed=False),
                "apart": _ours("apart", is_streamed=False),
            },
            figures={
                "shared_prefix_efficiency": Figure(
                    ("shared", "apart"),
                    lambda pair: (
                        ratio(pair, "apart", "shared", "prefill_seconds")
                        / shared_work_ratio(PREFIX_ROWS, PREFIX_SHARED, PREFIX_OWN)
                    ),
                )
            },
        ),
        "job in memory": Comparison(
            model=LLAMA,
            pairs=3,
            parts={
                "ours": _ours("job", is_streamed=False, at_a_time=256),
                "static": _peer("generated", "job", AT_A_TIME),
                "continuous": Part("continuous", {"model": LLAMA, "rows": "job"}),
            },
            figures={
                "in_memory_job_vs_generate": Figure(
                    ("ours", "static", "continuous"),
                    lambda pair: min(ratio(pair, peer, "ours", "seconds") for peer in ("static", "continuous")),
                )
            },
        ),
    }


def _streamed_job(is_quick: bool) -> Mapping[str, Comparison]:
    return {
        "streamed job": Comparison(
            model=LLAMA,
            pairs=3,
            parts={"ours": _ours("job"), "accelerate": _peer("accelerated", "job", AT_A_TIME)},
            figures={
                "streamed_job_vs_accelerate": Figure(
                    ("ours", "accelerate"), lambda pair: ratio(pair, "accelerate", "ours", "seconds")
                ),
                "mixed_lengths_efficiency": Figure(("ours",), lambda pair: mixed_lengths_efficiency(pair, is_quick=is_quick)),
            },
        ),
    }


def _guesses() -> Mapping[str, Comparison]:
    plain = Setting(rows="copying", model=COPYING, at_a_time=1, warm_up="copying warm-up")
    return {
        "guesses": Comparison(
            model=COPYING,
            pairs=5,
            parts={
                "with": Part("ours", asdict(replace(plain, tries_ahead=True))),
                "without": Part("ours", asdict(plain)),
            },
            figures={
                "streamed_b1_speculation_vs_plain": Figure(
                    ("with", "without"), lambda pair: tokens_a_second(pair["with"]) / tokens_a_second(pair["without"])
                ),
                "speculation_right_answers": Figure(
                    ("with", "without"), lambda pair: min(pair["with"]["right_answers"], pair["without"]["right_answers"])
                ),
            },
        ),
    }


def _bytes() -> Mapping[str, Comparison]:
    """What is read and what is held at the peak."""
    return {
        "experts": Comparison(
            model=EXPERTS,
            pairs=1,
            parts={"prompt": _ours("expert prompt", EXPERTS, 1), "steps": _ours("expert steps", EXPERTS, 1)},
            figures={
                "moe_bytes_read_fraction": Figure(("prompt", "steps"), lambda pair: fraction_of_experts(pair, "read")),
                "moe_bytes_ideal_fraction": Figure(("prompt", "steps"), lambda pair: fraction_of_experts(pair, "routed_ideal")),
            },
        ),
        "long prompt": Comparison(
            model=LONG,
            pairs=1,
            parts={
                "paged": _ours("long", LONG, 1, is_streamed=False, is_paged=True),
                "resident": _ours("long", LONG, 1, is_streamed=False),
            },
            figures={
                "paged_peak_over_resident": Figure(
                    ("paged", "resident"), lambda pair: ratio(pair, "paged", "resident", "peak_bytes")
                ),
                "paged_process_peak_over_resident": Figure(
                    ("paged", "resident"), lambda pair: ratio(pair, "paged", "resident", "peak_process_bytes")
                ),
            },
        ),
        "large model": Comparison(
            model=LARGE,
            pairs=1,
            parts={"ours": _ours("1x128 short", LARGE, 1, is_vocabulary_on_disk=True)},
            figures={
                "streamed_peak_over_model_bytes": Figure(
                    ("ours",), lambda pair: pair["ours"]["peak_bytes"] / pair["ours"]["model_bytes"]
                ),
                "streamed_estimate_over_peak": Figure(
                    ("ours",), lambda pair: pair["ours"]["estimated_bytes"] / pair["ours"]["peak_bytes"]
                ),
            },
        ),
    }
