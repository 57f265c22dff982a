"""Why does a plan wait: what does each worker say to it, which demands cannot all hold, and what would giving one up bring?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ollm_service.coordinator.fleet import live_when_its_turn_comes
from ollm_service.coordinator.service import Service
from ollm_service.coordinator.submission import ROWS_PER_PLAN
from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.conflicts import Ask, Conflicts, Demand, DemandKind, WayOut, find_conflicts, longest_fitting
from ollm_service.core.content import MOST_IMAGE_TOKENS
from ollm_service.core.draft_model import NoDraftModel, beside_draft, draft_among
from ollm_service.core.labels import ANY
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.matching import NoMatch, match
from ollm_service.core.options import LARGEST_COUNT, GenerationConfig, RuntimeConfig
from ollm_service.core.placement import Placement, RefusedTier, Unplaceable, place
from ollm_service.core.profile import ModelProfile
from ollm_service.core.quote import Candidate, Job, RowSize, quote
from ollm_service.core.row_size import TEMPLATE_TOKENS, most_prompt_tokens, most_tokens, own_limit, prompt_bytes
from ollm_service.store.jobs import NewRow
from ollm_service.store.views import JobView, PlanView, WaitingPlans, WorkerView

ROWS_AT_ONCE = 1_000
MOST_ROWS_READ = 5_000
MOST_ROWS_NAMED = 200  # in one command


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What one worker says to a plan.

    `reasons` are why it can never take it as it is. `placement` is how it would run it now, `refused` are the tiers that have no
    room for its longest row; both are empty where nothing is known of the model. `fits_when_free`: it has room once all of its
    memory is free.
    `seen_ms` is its last heartbeat.
    """

    worker: WorkerView
    seen_ms: int
    reasons: tuple[str, ...] = ()
    placement: Placement | None = None
    refused: tuple[RefusedTier, ...] = ()
    fits_when_free: bool = False

    @property
    def is_eligible(self) -> bool:
        """Whether it offers everything that the plan requires."""
        return not self.reasons


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A way out for people: the worker and its node, the command that takes it, and the seconds that its rows would take.

    No command where none does it; `seconds` is None where no speed is known. `skipped_rows` are those that it gives up.
    """

    way: WayOut
    node: str
    command: str | None
    seconds: float | None
    skipped_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why plans that ask for the same wait.

    `stuck_count` rows fit no connected worker; `stuck_rows` are their numbers, not all of them where there are very many.
    `workers` are those that are connected, `offline` the last process of each node that is not. `conflicts` is None where every
    row fits somewhere.
    """

    plan: PlanView
    plan_ids: tuple[str, ...]
    rows_left: int
    longest_row_tokens: int
    stuck_count: int = 0
    stuck_rows: tuple[int, ...] = ()
    workers: tuple[Standing, ...] = ()
    offline: tuple[Standing, ...] = ()
    conflicts: Conflicts | None = None
    offers: tuple[Offer, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobExplanation:
    """A job, its rows without a result by their plans' states, and why its queued plans wait, by what they ask for."""

    job: JobView
    rows_left: Mapping[ExecutionState, int]
    waiting: tuple[Explanation, ...]

    @property
    def stuck_rows(self) -> int:
        """How many rows fit no connected worker."""
        return sum(found.stuck_count for found in self.waiting)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fleet:
    """Everyone who could be asked, and who was there once."""

    now_ms: int
    connected: Sequence[WorkerView]
    offline: Sequence[WorkerView] = field(default=())

    @property
    def candidates(self) -> list[Candidate]:
        """The connected workers by their ids."""
        return [
            Candidate(name=there.worker_id, capabilities=there.capabilities, live=live_when_its_turn_comes(there))
            for there in self.connected
        ]

    def node(self, worker_id: str) -> str:
        """Where a connected worker runs."""
        return next(there.node for there in self.connected if there.worker_id == worker_id)


def explain_job(service: Service, job_id: str, tenant_id: str) -> JobExplanation:
    """Why a job's queued plans wait. Raises NotFound."""
    job = service.store.jobs.get(job_id, tenant_id)
    fleet = _fleet(service)
    waiting = tuple(_explain(service, fleet, job, alike) for alike in service.store.jobs.waiting(job_id, tenant_id))
    return JobExplanation(job=job, rows_left=service.store.jobs.rows_left(job_id), waiting=waiting)


def explain_plan(service: Service, plan: PlanView, tenant_id: str) -> Explanation:
    """Why one plan waits; of one that somebody holds, only who could take it; of a final one, nothing."""
    alike = WaitingPlans(plan=plan, plan_ids=(plan.plan_id,), rows_left=plan.row_count - plan.rows_done)
    if plan.state is ExecutionState.QUEUED:
        return _explain(service, _fleet(service), service.store.jobs.get(plan.job_id, tenant_id), alike)
    fleet = _Fleet(now_ms=service.store.now_ms(), connected=() if plan.state.is_final else service.fleet.fresh().workers)
    standings = tuple(_standing(plan, there, fleet.now_ms) for there in fleet.connected)
    return Explanation(plan=plan, plan_ids=alike.plan_ids, rows_left=alike.rows_left, longest_row_tokens=0, workers=standings)


def _fleet(service: Service) -> _Fleet:
    everyone = service.store.fleet.workers(active_only=False)
    connected = [there for there in everyone if there.state == "active"]
    nodes = {there.node for there in connected}
    last = {there.node: there for there in sorted(everyone, key=lambda there: -there.heartbeat_age_ms) if there.node not in nodes}
    return _Fleet(now_ms=service.store.now_ms(), connected=connected, offline=[last[node] for node in sorted(last)])


def _explain(service: Service, fleet: _Fleet, job: JobView, alike: WaitingPlans) -> Explanation:
    rows = _Rows(service=service, alike=alike, limit=(job.generation or GenerationConfig()).max_new_tokens)
    plan = alike.plan
    longest, longest_prompt = rows.longest()
    ask = Ask(
        plan=plan.planned,
        profile=plan.profile,
        config=plan.config,
        requirements=plan.requirements,
        longest_row_tokens=longest,
        longest_prompt_tokens=longest_prompt,
    )
    found = Explanation(
        plan=plan,
        plan_ids=alike.plan_ids,
        rows_left=alike.rows_left,
        longest_row_tokens=longest,
        workers=tuple(_standing(ask, there, fleet.now_ms) for there in fleet.connected),
        offline=tuple(_standing(ask, there, fleet.now_ms) for there in fleet.offline),
    )
    fits = longest_fitting(ask, fleet.candidates)
    if fits >= longest:
        return found
    stuck = rows.longer_than(fits)
    conflicts = find_conflicts(ask, fleet.candidates)
    return replace(
        found,
        stuck_count=len(stuck) if fits else alike.rows_left,
        stuck_rows=tuple(sorted(row.row for row, _ in stuck)),
        conflicts=conflicts,
        offers=tuple(_offer(service, fleet, job, way, stuck, rows.limit) for way in (conflicts.ways if conflicts else ())),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The rows of some waiting plans that have no result, read as far as is needed. `limit` is the job's on new tokens."""

    service: Service
    alike: WaitingPlans
    limit: int

    def longest(self) -> tuple[int, int]:
        """The bounds of the longest row's tokens and of the longest prompt's; 1 where there are no rows."""
        longest = prompt = 1
        for offset in range(0, MOST_ROWS_READ, ROWS_AT_ONCE):
            page = self._page(offset)
            longest = max([longest, *(most_tokens(row.request, self.limit, self._of_image) for row, _ in page)])
            prompt = max([prompt, *(most_prompt_tokens(row.request, self._of_image) for row, _ in page)])
            if len(page) < ROWS_AT_ONCE or not (own_limit(page[-1][0].request) or self._may_have_media):
                break  # of those without a limit of their own, the longest came first
        return longest, prompt

    def longer_than(self, tokens: int) -> list[tuple[NewRow, int]]:
        """The rows of more tokens, each with its bound: at most `MOST_ROWS_READ`."""
        found: list[tuple[NewRow, int]] = []
        for offset in range(0, MOST_ROWS_READ, ROWS_AT_ONCE):
            page = self._page(offset)
            bounds = [(row, most_tokens(row.request, self.limit, self._of_image)) for row, _ in page]
            found += [(row, bound) for row, bound in bounds if bound > tokens]
            if len(page) < ROWS_AT_ONCE or self._most_behind(*page[-1]) <= tokens:
                break
        return found

    @property
    def _of_image(self) -> int:
        profile = self.alike.plan.profile
        return profile.most_image_tokens if profile else MOST_IMAGE_TOKENS

    @property
    def _may_have_media(self) -> bool:
        """Whether tokens may not follow the bytes: a small image becomes as many as a large one."""
        return self.alike.plan.config.multimodal

    def _page(self, offset: int) -> Sequence[tuple[NewRow, int]]:
        return self.service.store.jobs.longest_rows(self.alike.plan_ids, offset=offset, limit=ROWS_AT_ONCE)

    def _most_behind(self, row: NewRow, stored_bytes: int) -> int:
        """No row behind this one has a higher bound: its text is no longer, and each message has more bytes than it adds."""
        return (
            LARGEST_COUNT if own_limit(row.request) or self._may_have_media else 2 * stored_bytes + TEMPLATE_TOKENS + self.limit
        )


def _standing(ask: Ask | PlanView, there: WorkerView, now_ms: int) -> Standing:
    """What a worker says: to a plan that waits with its longest row, to one that somebody holds without."""
    offered = there.capabilities
    found = Standing(worker=there, seen_ms=now_ms - there.heartbeat_age_ms)
    verdict = match(ask.requirements, offered)
    if isinstance(verdict, NoMatch):
        return replace(found, reasons=verdict.reasons)
    if isinstance(ask, PlanView) or ask.profile is None:
        return found
    try:
        now = _place(ask, ask.profile, offered, live_when_its_turn_comes(there))
    except NoDraftModel as absent:
        return replace(found, reasons=(str(absent),))
    when_free = now if isinstance(now, Placement) else _place(ask, ask.profile, offered, _idle(offered, there.live))
    return replace(
        found,
        placement=now if isinstance(now, Placement) else None,
        refused=now.refused,
        fits_when_free=isinstance(when_free, Placement),
    )


def _place(ask: Ask, profile: ModelProfile, offered: Capabilities, live: LiveState) -> Placement | Unplaceable:
    free = beside_draft(live, draft_among(offered.models, ask.config), ask.rows)
    return place(ask.plan, profile, ask.config, ask.requirements, offered, free, ask.rows)


def _idle(offered: Capabilities, live: LiveState) -> LiveState:
    """A worker with everything free."""
    return replace(
        live,
        device_free_bytes={device.device_id: device.memory_bytes for device in offered.devices},
        host_free_bytes=offered.host_memory_bytes,
        cache_free_bytes=offered.cache_disk.total_bytes if offered.cache_disk else 0,
        begun_bytes={},
    )


def _offer(service: Service, fleet: _Fleet, job: JobView, way: WayOut, stuck: Sequence[tuple[NewRow, int]], limit: int) -> Offer:
    gives_up_rows = any(demand.kind is DemandKind.LONG_ROWS for demand in way.demands)
    skipped = {row.row for row, bound in stuck if gives_up_rows and bound > way.ask.longest_row_tokens}
    return Offer(
        way=way,
        node=fleet.node(way.fit.worker),
        command=_command(job.job_id, way.demands, sorted(skipped)),
        seconds=_seconds(service, fleet, way, [row for row, _ in stuck if row.row not in skipped], limit),
        skipped_rows=tuple(sorted(skipped)),
    )


def _seconds(service: Service, fleet: _Fleet, way: WayOut, rows: Sequence[NewRow], limit: int) -> float | None:
    """How long the worker would take for these rows; None where it is not known, or where there are too many to tell."""
    profile = way.ask.profile
    if profile is None or not 0 < len(rows) < MOST_ROWS_READ:
        return None
    sizes = [
        RowSize(
            prompt_bytes=prompt_bytes(row.request),
            max_new_tokens=own_limit(row.request) or limit,
        )
        for row in rows
    ]
    work = Job(
        plan=way.ask.plan,
        profile=profile,
        config=way.ask.config,
        requirements=way.ask.requirements,
        rows=sizes,
        rows_per_plan=ROWS_PER_PLAN,
    )
    takers = [candidate for candidate in fleet.candidates if candidate.name == way.fit.worker]
    return quote(work, takers, service.store.quotes.measured(profile.digest)).seconds


def _command(job_id: str, demands: Sequence[Demand], skipped: Sequence[int]) -> str | None:
    """The command that gives these demands up; None where there is none for one of them."""
    flags: list[str] = []
    for demand in demands:
        if demand.kind is DemandKind.MODEL or (demand.kind is DemandKind.LONG_ROWS and not 0 < len(skipped) <= MOST_ROWS_NAMED):
            return None
        if demand.kind is DemandKind.LABELS:
            flags.append(f"--where {ANY}")
        if demand.kind is DemandKind.LONG_ROWS:
            flags.append(f"--skip-rows {','.join(str(row) for row in skipped)}")
        flags += [_flag(option) for option in demand.options]
    return f"ollm-service amend {job_id} {' '.join(flags)}"


def _flag(option: str) -> str:
    """What sets an option back to its default: a switch has no third position."""
    default = getattr(RuntimeConfig(), option)
    name = option.replace("_", "-")
    if isinstance(default, bool):
        return f"--{name}" if default else f"--no-{name}"
    return f"--{name} {ANY}"
