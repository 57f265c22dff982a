"""When would a job be done, and by whom? Every worker's placement and rate, and the plans dealt out as workers take them.

- Plans of other jobs that come first are dealt out before, in the same way, where a worker's speed with them is known.
- Dispatch lets every eligible worker take a plan, so that a slow one may take the last and hold up the end. Where the job would
  end noticeably sooner without some workers, that is said, and the label expression that leaves them out.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ollm_service.core.dealing import Dealt, deal
from ollm_service.core.labels import leaving_out
from ollm_service.core.rates import MeasuredAttempt
from ollm_service.core.worker_quote import Candidate, Job, Part, RowSize, WorkerQuote, part_of, parts_of

__all__ = ["Ahead", "Candidate", "Job", "LeaveOut", "Quote", "RowSize", "WorkerQuote", "quote"]

HOUR = 3600.0
# What is worth telling: a job that ends so much sooner, in seconds and as a part of the whole.
NOTICEABLE_SECONDS, NOTICEABLE_PART = 300.0, 0.05
MOST_LEFT_OUT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Plans of other jobs that ask for the same and come before this job's: how many, with how many rows in all.

    `job` holds a sample of their rows, `attempts` those that ran their model. Of the plans, `held_rows` are the rows that each
    candidate, in their order, holds already; `queued_rows` are those that nobody has begun.
    """

    job: Job
    attempts: Sequence[MeasuredAttempt]
    plans: int
    queued_rows: int
    held_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveOut:
    """The job would end sooner, in so many seconds, without these nodes: with the label expression `where`."""

    nodes: tuple[str, ...]
    where: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """The whole. Tokens are estimates, of the output at most. Seconds from now to the last row: expected, and a range.

    They are None where no worker can run the job or none of their speeds is known. `is_measured` where every worker that takes
    part has run this model before in that tier. `unplaceable_rows` fit no worker. `plans_ahead` of other jobs come first and are
    counted in; `plans_not_counted` may, but how long they take is not known. `seconds_anywhere` it would take without the label
    expression, told where that is noticeably less, or where nothing runs with it.
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
    plans_ahead: int = 0
    plans_not_counted: int = 0
    leave_out: LeaveOut | None = None
    seconds_anywhere: float | None = None


def quote(job: Job, candidates: Sequence[Candidate], attempts: Sequence[MeasuredAttempt], ahead: Sequence[Ahead] = ()) -> Quote:
    """Quote a job. `attempts` are those that have run the same model, anywhere; `ahead` stands in the order of the queue."""
    own = parts_of(job, candidates, attempts)
    before = [(found, part_of(found.job, candidates, found.attempts)) for found in ahead]
    scene = _Scene(candidates=candidates, own=own, before=[(found, part) for found, part in before if part.is_known])
    in_the_way = [(found.plans, part.is_known) for found, part in before if _is_in_the_way(found, part, own)]
    expected, slow, fast = (scene.deal(luck) for luck in (None, False, True))
    anywhere = None
    if job.requirements.where is not None and not any(candidate.is_hypothetical for candidate in candidates):
        free = replace(
            scene, own=parts_of(replace(job, requirements=replace(job.requirements, where=None)), candidates, attempts)
        )
        anywhere = free.deal().seconds
    able = [part.quotes[number] for part in scene.parts for number, rows in enumerate(expected.rows) if rows and part.can(number)]
    return Quote(
        row_count=scene.row_count,
        prompt_tokens=sum(part.work.prompt_tokens for part in own),
        most_output_tokens=sum(part.work.output_tokens for part in own),
        workers=tuple(_told(scene, number, expected) for number in range(len(candidates))),
        seconds=expected.seconds,
        fastest_seconds=_least(fast.seconds, expected.seconds),
        slowest_seconds=_most(slow.seconds, expected.seconds),
        is_measured=bool(able) and all(found.rate is not None and found.rate.attempts > 0 for found in able),
        unplaceable_rows=scene.unplaceable_rows(()),
        longest_row_tokens=max(part.work.longest for part in own) if scene.row_count else 0,
        plans_ahead=sum(plans for plans, is_known in in_the_way if is_known),
        plans_not_counted=sum(plans for plans, is_known in in_the_way if not is_known),
        leave_out=_leave_out(scene, expected),
        seconds_anywhere=anywhere if _is_noticeably_sooner(anywhere, expected.seconds) else None,
    )


def _least(one: float | None, other: float | None) -> float | None:
    """Dealing is greedy: it may end a little later with faster workers."""
    return None if one is None or other is None else min(one, other)


def _most(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


def _is_in_the_way(found: Ahead, theirs: Part, own: Sequence[Part]) -> bool:
    """Whether some candidate would do them first: one that can take this job, and holds or can take those, too."""
    return any(
        any(not part.quotes[number].refused for part in own)
        and (held or (found.queued_rows and not theirs.quotes[number].refused))
        for number, held in enumerate(found.held_rows)
    )


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """Everything that is dealt: the job's own parts, and what comes before them."""

    candidates: Sequence[Candidate]
    own: Sequence[Part]
    before: Sequence[tuple[Ahead, Part]]

    @property
    def parts(self) -> list[Part]:
        return [*(part for _, part in self.before), *self.own]

    @property
    def row_count(self) -> int:
        return sum(part.work.row_count for part in self.own)

    def deal(self, luck: bool | None = None, left_out: Collection[int] = ()) -> Dealt:
        """Deal everything out; of the job itself, these candidates take nothing."""
        piles = [part.pile(found.queued_rows, luck) for found, part in self.before]
        busy = [
            sum(found.held_rows[number] * (part.paces(luck)[number] or 0.0) for found, part in self.before)
            for number in range(len(self.candidates))
        ]
        own = [part.pile(part.work.row_count, luck).without(left_out) for part in self.own]
        return deal([*piles, *own], busy, own=len(own))

    def unplaceable_rows(self, left_out: Collection[int]) -> int:
        """Rows that are too long for every candidate but these."""
        unplaceable = 0
        for part in self.own:
            quotes = [found for number, found in enumerate(part.quotes) if number not in left_out and not found.refused]
            unplaceable += min((found.left_out_rows for found in quotes), default=part.work.row_count)
        return unplaceable

    def pace(self, number: int) -> float | None:
        """A candidate's seconds for a mean row of those that it takes; None where it takes none, or nobody knows."""
        known = [(part.work.row_count, pace) for part in self.own if (pace := part.paces(None)[number]) is not None]
        rows = sum(count for count, _ in known)
        return sum(count * pace for count, pace in known) / rows if rows else None

    @cached_property
    def nodes(self) -> dict[str, list[int]]:
        """The candidates that take part by their nodes, the slowest node first; none where machines are imagined."""
        found: dict[str, list[int]] = defaultdict(list)
        if any(candidate.is_hypothetical for candidate in self.candidates):
            return {}
        paces = {number: pace for number in range(len(self.candidates)) if (pace := self.pace(number)) is not None}
        for number in sorted(paces, key=lambda number: -paces[number]):
            found[self.candidates[number].capabilities.node].append(number)
        return found

    def seconds_without(self, nodes: Collection[str]) -> float | None:
        """When the job would end without these nodes; None where some rows could then not be run."""
        left_out = {number for node in nodes for number in self.nodes[node]}
        if self.unplaceable_rows(left_out) > self.unplaceable_rows(()):
            return None
        return self.deal(left_out=left_out).seconds


def _leave_out(scene: _Scene, expected: Dealt) -> LeaveOut | None:
    """The fewest slow nodes without which the job would end noticeably sooner."""
    if not _is_long(expected.seconds):
        return None
    slowest = list(scene.nodes)[:MOST_LEFT_OUT]
    ends = [(seconds, count) for count in range(1, len(slowest) + 1) if (seconds := scene.seconds_without(slowest[:count]))]
    if not ends:
        return None
    best, count = min(ends)
    chosen = slowest[:count]
    for node in slowest[:count]:
        fewer = [other for other in chosen if other != node]
        seconds = scene.seconds_without(fewer)
        if seconds is not None and seconds <= best:
            chosen, best = fewer, seconds
    if not _is_noticeably_sooner(best, expected.seconds):
        return None
    where = leaving_out(scene.own[0].work.job.requirements.where, "node", chosen)
    return None if where is None else LeaveOut(nodes=tuple(chosen), where=where, seconds=best)


def _is_noticeably_sooner(one: float | None, other: float | None) -> bool:
    """Whether an end is so much before another that it is worth telling; any end is before none."""
    if one is None or other is None:
        return one is not None
    return other - one >= max(NOTICEABLE_SECONDS, NOTICEABLE_PART * other)


def _is_long(seconds: float | None) -> bool:
    return seconds is not None and seconds >= NOTICEABLE_SECONDS


def _whole(own: Sequence[Part], number: int) -> WorkerQuote:
    """One candidate's quotes of all parts as one: how it runs the largest that it takes, and what it leaves of the others."""
    taken = [part for part in own if not part.quotes[number].refused]
    if not taken:
        return own[0].quotes[number]
    left_out = sum(part.work.row_count if part.quotes[number].refused else part.quotes[number].left_out_rows for part in own)
    longest = max(part.quotes[number].longest_row_tokens or part.work.longest for part in taken)
    main = max(taken, key=lambda part: part.work.row_count).quotes[number]
    return replace(main, left_out_rows=left_out, longest_row_tokens=longest if left_out else None)


def _told(scene: _Scene, number: int, expected: Dealt) -> WorkerQuote:
    """A worker's quote with what dealing has shown."""
    found, pace, row_count = _whole(scene.own, number), scene.pace(number), scene.row_count
    node, saves = scene.candidates[number].capabilities.node, None
    if expected.seconds is not None and _is_long(expected.seconds) and node in list(scene.nodes)[:MOST_LEFT_OUT]:
        without = scene.seconds_without([node]) if expected.rows[number] else None
        saves = None if without is None else without - expected.seconds
    return replace(
        found,
        rows_an_hour=HOUR / pace if pace else 0.0,
        share=expected.rows[number] / row_count if row_count else 0.0,
        begins_seconds=expected.begins[number],
        saves_seconds=saves,
    )
