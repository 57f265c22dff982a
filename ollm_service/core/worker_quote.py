"""What would each worker make of a job's rows: how would it run them, how fast, and which of them have room there?"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ollm_service.core.capabilities import Capabilities, Device, LiveState
from ollm_service.core.dealing import Pile
from ollm_service.core.draft_model import NoDraftModel, beside_draft, draft_among
from ollm_service.core.leaving import is_routed
from ollm_service.core.matching import NoMatch, match
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.passing import passing_layers
from ollm_service.core.placement import Placement, RowBounds, Unplaceable, place
from ollm_service.core.plan import RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.rates import MeasuredAttempt, Rate, Run, measured_rate, output_share, probed_rate, tokens_per_byte
from ollm_service.core.requirements import Requirements
from ollm_service.core.row_size import TEMPLATE_TOKENS
from ollm_service.core.splitting import groups

# What nobody has measured: rows rarely use all the tokens that they are allowed.
USUAL_OUTPUT_SHARE = (0.25, 1.0)
MOST_CUTS = 8  # of a group of rows, by what workers hold of it
MOST_PLANS_DEALT = 4_096  # more are dealt out in equal heaps


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSize:
    """One row: the bytes of its prompt, the most tokens that it may answer, and whether it may draw them."""

    prompt_bytes: int
    max_new_tokens: int
    is_sampled: bool = True


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
    long for it: more than `longest_row_tokens`. `begins_seconds` from now it takes its first plan, None where it takes none.
    `saves_seconds`: so much later the job would end without its node; less than 0 where it would end sooner, None where it was
    not asked: of short jobs, of a node alone, and where machines are imagined.
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
    longest_row_tokens: int | None = None
    begins_seconds: float | None = None
    saves_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The rows in figures: lengths in ascending order with all of their output, and the part of that which is really made.

    `prompts` are the tokens of the same rows' prompts; `is_sampled`: some row may draw its tokens.
    """

    job: Job
    lengths: Sequence[int]
    prompts: Sequence[int]
    prompt_tokens: int
    output_tokens: int
    shares: tuple[float, float]
    is_sampled: bool

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """The tokens of the longest row; 1 where there is none."""
        return self.lengths[-1] if self.lengths else 1

    def share(self, luck: bool | None) -> float:
        """The part of the allowed tokens that is made: expected, or with good or bad luck."""
        low, high = self.shares
        return (low * high) ** 0.5 if luck is None else low if luck else high


@dataclass(frozen=True, kw_only=True)
class Part:
    """What each candidate would do with the rows of one job."""

    work: Work
    quotes: Sequence[WorkerQuote]

    def can(self, number: int) -> bool:
        """Whether a candidate takes any of them, at a known speed."""
        return bool(self.paces(None)[number])

    @property
    def is_known(self) -> bool:
        """Whether any candidate takes them at a known speed."""
        return any(self.paces(None))

    def paces(self, luck: bool | None) -> tuple[float | None, ...]:
        """Each candidate's seconds for a row, expected or with luck; None where it takes none, or nobody knows."""
        return self._paces[luck]

    @cached_property
    def _paces(self) -> dict[bool | None, tuple[float | None, ...]]:
        return {
            luck: tuple(_row_seconds(self.work, found, luck) or None for found in self.quotes) for luck in (None, False, True)
        }

    def pile(self, rows: int, luck: bool | None) -> Pile:
        """So many rows like these."""
        return Pile(
            rows=rows,
            plan_rows=max(self.work.job.rows_per_plan, -(-rows // MOST_PLANS_DEALT)),
            row_seconds=self.paces(luck),
            load_seconds=tuple(found.rate.load_seconds if found.rate else 0.0 for found in self.quotes),
        )


def parts_of(job: Job, candidates: Sequence[Candidate], attempts: Sequence[MeasuredAttempt]) -> list[Part]:
    """A job's rows in the groups that a submission makes of them, the usual ones first, each placed for its own longest row.

    Where some candidate holds only the shorter rows of a group, the longer ones are a part of their own. Never empty.
    """
    context = job.profile.most_row_tokens
    needs = [most_tokens_of(row, context) for row in job.rows]
    parts = []
    for group in groups(needs) or [[]]:
        part = part_of(replace(job, rows=[job.rows[position] for position in group]), candidates, attempts)
        parts += _cut(part, candidates, attempts)
    return parts


def _cut(part: Part, candidates: Sequence[Candidate], attempts: Sequence[MeasuredAttempt]) -> list[Part]:
    """The part in pieces, shorter rows first, each of which a candidate holds as a whole or not at all."""
    limits = sorted({found.longest_row_tokens for found in part.quotes if found.left_out_rows and found.longest_row_tokens})
    limits = limits[:: -(-len(limits) // MOST_CUTS)] if limits else []
    job, ratio = part.work.job, tokens_per_byte(attempts, part.work.job.profile)
    pieces: dict[int, list[RowSize]] = {}
    for row in job.rows:
        length = _length(_prompt_tokens(row, ratio), row.max_new_tokens, job.profile.most_row_tokens)
        pieces.setdefault(bisect_left(limits, length), []).append(row)
    if len(pieces) < 2:
        return [part]
    return [part_of(replace(job, rows=pieces[number]), candidates, attempts) for number in sorted(pieces)]


def most_tokens_of(row: RowSize, context: int | None) -> int:
    """The bound of a row's tokens by which a submission splits rows; what messages add is left aside."""
    bound = row.prompt_bytes + TEMPLATE_TOKENS + row.max_new_tokens
    return bound if context is None else min(bound, context)


def part_of(job: Job, candidates: Sequence[Candidate], attempts: Sequence[MeasuredAttempt]) -> Part:
    """What each candidate would do with a job's rows. `attempts` are those that have run the same model, anywhere."""
    work = _work(job, attempts)
    return Part(work=work, quotes=[_worker_quote(work, candidate, attempts) for candidate in candidates])


def _work(job: Job, attempts: Sequence[MeasuredAttempt]) -> Work:
    ratio, share = tokens_per_byte(attempts, job.profile), output_share(attempts)
    prompts = [_prompt_tokens(row, ratio) for row in job.rows]
    context = job.profile.most_row_tokens
    rows = sorted((_length(prompt, row.max_new_tokens, context), prompt) for row, prompt in zip(job.rows, prompts, strict=True))
    return Work(
        job=job,
        lengths=[length for length, _ in rows],
        prompts=[prompt for _, prompt in rows],
        prompt_tokens=sum(prompts),
        output_tokens=sum(row.max_new_tokens for row in job.rows),
        shares=(share, share) if share is not None else USUAL_OUTPUT_SHARE,
        is_sampled=any(row.is_sampled for row in job.rows),
    )


def _prompt_tokens(row: RowSize, ratio: float) -> int:
    """About so many, and never more than the bound: what a template adds weighs more in the short rows that were measured."""
    return max(1, min(round(row.prompt_bytes * ratio), row.prompt_bytes + TEMPLATE_TOKENS))


def _length(prompt: int, max_new_tokens: int, context: int | None) -> int:
    """The tokens of a row with its answer, which ends where the model's context is full; only a prompt may be longer."""
    length = prompt + max_new_tokens
    return length if context is None else max(prompt + 1, min(length, context))


def _worker_quote(work: Work, candidate: Candidate, attempts: Sequence[MeasuredAttempt]) -> WorkerQuote:
    job, capabilities = work.job, candidate.capabilities
    found = match(job.requirements, capabilities)
    if isinstance(found, NoMatch):
        return WorkerQuote(name=candidate.name, is_hypothetical=candidate.is_hypothetical, refused=found.reasons)
    bounds = _bounds(work)
    try:
        draft = draft_among(capabilities.models, job.config)
    except NoDraftModel as absent:
        return WorkerQuote(name=candidate.name, is_hypothetical=candidate.is_hypothetical, refused=(str(absent),))
    live = beside_draft(candidate.live, draft, bounds)
    placed = place(job.plan, job.profile, job.config, job.requirements, capabilities, live, bounds)
    if isinstance(placed, Unplaceable):
        return WorkerQuote(name=candidate.name, is_hypothetical=candidate.is_hypothetical, refused=(placed.reason,))
    device = next(device for device in capabilities.devices if device.device_id == placed.device_id)
    backend_id = job.plan.backend_id or ""
    disk_rate = capabilities.cache_disk.read_rate if capabilities.cache_disk else None
    rate = measured_rate(attempts, device_name=device.name, tier=placed.tier, backend_id=backend_id)
    longest = _longest_row(work, placed)
    return WorkerQuote(
        name=candidate.name,
        is_hypothetical=candidate.is_hypothetical,
        placement=placed,
        device=device,
        free_bytes=live.device_free_bytes.get(device.device_id, 0),
        rate=rate or probed_rate(job.profile, device, disk_rate=disk_rate, run=_run(work, placed, capabilities)),
        left_out_rows=0 if longest is None else work.row_count - bisect_right(work.lengths, longest),
        longest_row_tokens=longest,
    )


def _bounds(work: Work) -> RowBounds:
    """What a worker goes by, which counts no tokens before it places a plan; what messages add is left aside."""
    rows = work.job.rows
    prompts = [row.prompt_bytes + TEMPLATE_TOKENS for row in rows]
    bounds = [prompt + row.max_new_tokens for prompt, row in zip(prompts, rows, strict=True)]
    return RowBounds(
        longest=max(bounds, default=1),
        longest_prompt=max(prompts, default=1),
        shortest=min(bounds, default=1),
        count=min(len(rows), work.job.rows_per_plan),
        are_sampled=work.is_sampled,
    )


def _run(work: Work, placed: Placement, capabilities: Capabilities) -> Run:
    """What a rate depends on, for a mean row half-way through its answer."""
    rows = max(1, work.row_count)
    prompt, output = work.prompt_tokens / rows, work.output_tokens / rows * work.share(None)
    profile = work.job.profile
    sizes, head = profile.layer_bytes, profile.head_bytes or profile.embedding_bytes
    pieces = passing_layers(profile, is_routed=is_routed(work.job.plan, capabilities))
    return Run(
        rows=min(placed.micro_batch, work.job.rows_per_plan, rows),
        prompt_tokens=round(prompt),
        tokens=round(prompt + output / 2),
        kv=placed.kv_cache_strategy,
        is_sampled=work.is_sampled,
        host_bytes=sum(sizes[layer] for layer in placed.host_layers),
        disk_bytes=sum(sizes[layer] for layer in placed.disk_layers) + head * placed.vocabulary_on_disk,
        routed_bytes=sum(sizes[layer] - pieces[layer] for layer in placed.disk_layers),
    )


def _longest_row(work: Work, placed: Placement) -> int | None:
    """The tokens of the longest row that runs there; None where all do."""
    fits = placed.longest_row_tokens
    return None if fits is None or fits >= work.longest else fits


def _row_seconds(work: Work, found: WorkerQuote, luck: bool | None) -> float | None:
    """Seconds that one mean row takes of this worker: its part of a prefill, and of the passes of a micro-batch."""
    rate, placement = found.rate, found.placement
    if rate is None or placement is None or not work.row_count:
        return None
    rows = min(placement.micro_batch, work.job.rows_per_plan, work.row_count)
    outputs = max(0.0, work.output_tokens / work.row_count * work.share(luck) - 1)
    prompts = work.prompt_tokens / work.row_count / rate.prefill
    passes = outputs * rate.pass_seconds_of(rows, is_pessimistic=luck is not True) / rows
    beside = rate.row_seconds + rate.plan_seconds / work.job.rows_per_plan
    spread = rate.spread_of(rows)
    factor = 1.0 if luck is None else 1 / spread if luck else spread
    return (prompts + passes + beside) * factor
