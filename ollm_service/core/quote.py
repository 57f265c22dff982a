"""When would a job be done, and by whom? Every worker's placement and rate, and the plans dealt out as workers take them."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ollm_service.core.capabilities import Capabilities, Device, LiveState
from ollm_service.core.matching import NoMatch, match
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.placement import Placement, RowBounds, Unplaceable, place
from ollm_service.core.plan import RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.rates import MeasuredAttempt, Rate, measured_rate, output_share, probed_rate, tokens_per_byte
from ollm_service.core.requirements import Requirements

HOUR = 3600.0
# What nobody has measured: rows rarely use all the tokens that they are allowed.
USUAL_OUTPUT_SHARE = (0.25, 1.0)
MOST_PLANS_DEALT = 4_096  # more are dealt out in equal heaps


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSize:
    """One row: the bytes of its prompt and the most tokens that it may answer."""

    prompt_bytes: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker that might take part; `is_hypothetical` where it is only asked `what if`."""

    name: str
    capabilities: Capabilities
    live: LiveState
    is_hypothetical: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be quoted: an executable plan, what it needs, and its rows in plans of at most `rows_per_plan`."""

    plan: RuntimePlan
    profile: ModelProfile
    config: RuntimeConfig
    requirements: Requirements
    rows: Sequence[RowSize]
    rows_per_plan: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerQuote:
    """One worker's part.

    `refused` says why it cannot take part, and is empty where it can; then `placement` is how it would run and `rate` how fast,
    None where its speed is not known. `rows_an_hour` and `share` (of the rows, 0 to 1) are expectations. `left_out_rows` are too
    long for it.
    """

    name: str
    is_hypothetical: bool
    refused: tuple[str, ...] = ()
    placement: Placement | None = None
    device: Device | None = None
    free_bytes: int = 0
    rate: Rate | None = None
    rows_an_hour: float = 0.0
    share: float = 0.0
    left_out_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """The whole. Tokens are estimates, of the output at most. Seconds from now to the last row: expected, and a range.

    They are None where no worker can run the job or none of their speeds is known. `is_measured` where every worker that takes
    part has run this model before in that tier. `unplaceable_rows` fit no worker.
    """

    row_count: int
    prompt_tokens: int
    most_output_tokens: int
    workers: tuple[WorkerQuote, ...]
    seconds: float | None = None
    fastest_seconds: float | None = None
    slowest_seconds: float | None = None
    is_measured: bool = False
    unplaceable_rows: int = 0
    longest_row_tokens: int = 0


def quote(job: Job, candidates: Sequence[Candidate], attempts: Sequence[MeasuredAttempt]) -> Quote:
    """Quote a job. `attempts` are those that have run the same model, anywhere."""
    ratio, share = tokens_per_byte(attempts, job.profile), output_share(attempts)
    sizes = [(_prompt_tokens(row, ratio), row.max_new_tokens) for row in job.rows]
    prompt_tokens, most_output = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    lengths = sorted(prompt + output for prompt, output in sizes)
    shares = (share, share) if share is not None else USUAL_OUTPUT_SHARE
    work = _Work(
        job=job,
        lengths=lengths,
        longest_prompt=max((size[0] for size in sizes), default=1),
        prompt_tokens=prompt_tokens,
        output_tokens=most_output,
        shares=shares,
    )
    quotes = [_worker_quote(work, candidate, attempts) for candidate in candidates]
    expected, slow, fast = (_deal(work, quotes, luck) for luck in (None, False, True))
    told = tuple(_with_share(work, found, dealt) for found, dealt in zip(quotes, expected[1], strict=True))
    able = [found for found in told if found.share > 0]
    return Quote(
        row_count=len(sizes),
        prompt_tokens=prompt_tokens,
        most_output_tokens=most_output,
        workers=told,
        seconds=expected[0],
        fastest_seconds=_least(fast[0], expected[0]),
        slowest_seconds=_most(slow[0], expected[0]),
        is_measured=bool(able) and all(found.rate is not None and found.rate.attempts > 0 for found in able),
        unplaceable_rows=min((found.left_out_rows for found in told if not found.refused), default=len(sizes)),
        longest_row_tokens=lengths[-1] if lengths else 0,
    )


def _least(one: float | None, other: float | None) -> float | None:
    """Dealing is greedy: it may end a little later with faster workers."""
    return None if one is None or other is None else min(one, other)


def _most(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """The rows in figures: lengths in ascending order with all of their output, and the part of that which is really made."""

    job: Job
    lengths: Sequence[int]
    longest_prompt: int
    prompt_tokens: int
    output_tokens: int
    shares: tuple[float, float]

    @property
    def row_count(self) -> int:
        return len(self.lengths)

    def share(self, luck: bool | None) -> float:
        low, high = self.shares
        return (low * high) ** 0.5 if luck is None else low if luck else high


def _prompt_tokens(row: RowSize, ratio: float) -> int:
    return max(1, round(row.prompt_bytes * ratio))


def _worker_quote(work: _Work, candidate: Candidate, attempts: Sequence[MeasuredAttempt]) -> WorkerQuote:
    job, capabilities = work.job, candidate.capabilities
    found = match(job.requirements, capabilities)
    if isinstance(found, NoMatch):
        return WorkerQuote(name=candidate.name, is_hypothetical=candidate.is_hypothetical, refused=found.reasons)
    placed = place(
        job.plan,
        job.profile,
        job.config,
        job.requirements,
        capabilities,
        candidate.live,
        RowBounds(
            longest=max(work.lengths, default=1),
            longest_prompt=work.longest_prompt,
            shortest=min(work.lengths, default=1),
            count=min(work.row_count, job.rows_per_plan),
        ),
    )
    if isinstance(placed, Unplaceable):
        return WorkerQuote(name=candidate.name, is_hypothetical=candidate.is_hypothetical, refused=(placed.reason,))
    device = next(device for device in capabilities.devices if device.device_id == placed.device_id)
    backend_id = job.plan.backend_id or ""
    disk_rate = capabilities.cache_disk.read_rate if capabilities.cache_disk else None
    rate = measured_rate(attempts, device_name=device.name, tier=placed.tier, backend_id=backend_id)
    longest = placed.longest_row_tokens
    return WorkerQuote(
        name=candidate.name,
        is_hypothetical=candidate.is_hypothetical,
        placement=placed,
        device=device,
        free_bytes=candidate.live.device_free_bytes.get(device.device_id, 0),
        rate=rate or probed_rate(job.profile, device, rows=placed.micro_batch, disk_rate=disk_rate),
        left_out_rows=0 if longest is None else sum(length > longest for length in work.lengths),
    )


def _row_seconds(work: _Work, found: WorkerQuote, luck: bool | None) -> float | None:
    """Seconds that one mean row takes of this worker: its part of a prefill, and of the passes of a micro-batch."""
    rate, placement = found.rate, found.placement
    if rate is None or placement is None or not work.row_count:
        return None
    rows = min(placement.micro_batch, work.job.rows_per_plan, work.row_count)
    outputs = max(0.0, work.output_tokens / work.row_count * work.share(luck) - 1)
    prompts = work.prompt_tokens / work.row_count / rate.prefill
    passes = outputs * rate.pass_seconds_of(rows, is_pessimistic=luck is not True) / rows
    factor = 1.0 if luck is None else 1 / rate.spread if luck else rate.spread
    return (prompts + passes) * factor


def _deal(work: _Work, quotes: Sequence[WorkerQuote], luck: bool | None) -> tuple[float | None, list[int]]:
    """Deal the plans out as workers take them, each the next when it is free; seconds to the end, and the rows of each."""
    paces = [_row_seconds(work, found, luck) for found in quotes]
    free = [(found.rate.load_seconds, number) for number, found in enumerate(quotes) if paces[number] and found.rate]
    dealt = [0] * len(quotes)
    if not free:
        return None, dealt
    heapq.heapify(free)
    plan_rows = max(work.job.rows_per_plan, -(-work.row_count // MOST_PLANS_DEALT))
    left, end = work.row_count, 0.0
    while left > 0:
        at, number = heapq.heappop(free)
        rows = min(plan_rows, left)
        at += rows * (paces[number] or 0.0)
        dealt[number] += rows
        left, end = left - rows, max(end, at)
        heapq.heappush(free, (at, number))
    return end, dealt


def _with_share(work: _Work, found: WorkerQuote, dealt: int) -> WorkerQuote:
    pace = _row_seconds(work, found, None)
    return replace(found, rows_an_hour=HOUR / pace if pace else 0.0, share=dealt / work.row_count if work.row_count else 0.0)
