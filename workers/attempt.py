"""What becomes of one assignment, from its claim to its end? Place it, run it in the slot's runner, record, and hand it back.

Every way out is one verb of the store: `record` of the last row, `fail`, `crash` or `release`, or none of them when the lease
is lost. While the database is away, finished results wait here, and are recorded if it comes back before the lease is too old.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.checkpoint import BrokenCheckpoint
from ollm_service.core.errors import DatabaseUnavailable
from ollm_service.core.finalization import CannotFallBack, fall_back, finalize
from ollm_service.core.leasing import Assignment, AttemptReport, LeaseLost, RowResult, WorkRow
from ollm_service.core.passes import PassOutcome, describe
from ollm_service.core.placement import Placement, RowBounds, Unplaceable, place
from ollm_service.core.plan import PassId, RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import demanded_passes
from ollm_service.core.retry import Failure
from ollm_service.core.row_size import most_prompt_tokens, prompt_bytes
from ollm_service.core.wire import (
    AttemptFailed,
    BatchDone,
    BatchStarted,
    Execute,
    Finished,
    Hello,
    Loaded,
    LongRow,
    Message,
    SpecializationFailed,
    Stop,
    Stopped,
    to_json,
)
from ollm_service.store.leases import Leases
from workers.companions import Companions, companions_here
from workers.lease import Lease
from workers.slots import Slot
from workers.supervisor import Died

TICK_SECONDS = 0.1
DECLINE_MS = 15_000
RETRY_RECORD_SECONDS = 0.5
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Ending(StrEnum):
    """How an attempt left this worker."""

    FINISHED = "finished"
    DECLINED = "declined"
    RELEASED = "released"
    FAILED = "failed"
    CRASHED = "crashed"
    LOST = "lost"


class Stopping(StrEnum):
    """Why the runner was asked to stop; a later reason replaces an earlier one only if it stands further down."""

    DRAIN = "drain"
    CANCEL = "cancel"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds that a runner gets: without any sign of life, and after `Stop` until SIGTERM and until SIGKILL."""

    stall: float
    terminate: float = 3.0
    kill: float = 10.0
    kill_when_lost: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What an attempt asks the worker. `must_release` and `must_hurry` are the worker's own end, gentle and at once."""

    leases: Leases
    models_dir: Path
    capabilities: Callable[[], Capabilities]
    live: Callable[[Slot], LiveState]
    clock: Callable[[], float]
    must_release: Callable[[], bool]
    must_hurry: Callable[[], bool]
    patience: Patience


class Attempt:
    """One assignment in one slot; `run` once."""

    def __init__(self, assignment: Assignment, lease: Lease, slot: Slot, surroundings: Surroundings) -> None:
        self._assignment = assignment
        self._lease = lease
        self._slot = slot
        self._around = surroundings
        self._plan: RuntimePlan = assignment.runtime_plan
        self._placement: Placement | None = None
        self._companions = Companions(models_dir=surroundings.models_dir)
        self._too_long: Unplaceable | None = None  # why rows longer than the placement holds have no room here
        self._ending: Ending | None = None
        self._stopping: tuple[Stopping, float] | None = None
        self._rows = {row.row: row for row in assignment.rows}
        self._missing = set(self._rows)
        self._answered = {"prompt_bytes": 0, "allowed_tokens": 0}
        self._known_lengths: dict[int, LongRow] = {}  # of rows that turned out longer than their bound
        self._in_flight: tuple[int, ...] = ()
        self._waiting: list[RowResult] = []
        self._retry_at = 0.0
        self._report: AttemptReport | None = None
        self._has_reported = False
        self._measured: dict[str, Any] = {}
        self._measured_before: dict[str, Any] = {}  # until rows were placed again
        self._tokens = 0
        self._generating_since: float | None = None
        self._heard_at = 0.0
        self._has_heard = False
        self._found_running = False
        self._stalled = False
        self._has_terminated = False

    def run(self) -> Ending:
        """Work until the plan has left this worker. Raises only what is a bug here."""
        with self._slot.working():
            profile = self._profile_here()
            if profile is None:
                return self._decline("the model is not in this worker's models folder any more")
            try:
                here, models = self._around.models_dir, self._around.capabilities().models
                self._companions = companions_here(here, models, self._assignment.config)
            except FileNotFoundError as absent:
                return self._decline(str(absent))
            except BrokenCheckpoint as broken:
                self._fail("adapter_refused", f"The adapter {self._assignment.config.adapter_dir} cannot be used: {broken}.")
                return self._ending or Ending.LOST
            bounds = self._bounds(profile)
            placed = self._place(self._plan, profile, bounds)
            if isinstance(placed, Unplaceable):
                return self._decline(placed.reason)
            if self._take_place(placed, profile, bounds) and self._started():
                while self._ending is None:
                    message = self._slot.runner.receive(timeout=TICK_SECONDS)
                    if message is not None:
                        self._take(message, profile)
                    if self._ending is None:
                        self._watch()
        return self._ending or Ending.LOST

    # --- giving the runner its work

    def _profile_here(self) -> ModelProfile | None:
        """The model as this worker has it: the same digest, perhaps under another name."""
        return self._around.capabilities().model(self._assignment.profile.digest)

    def _bounds(self, profile: ModelProfile) -> RowBounds:
        """How long the rows without an answer may be."""
        missing = [row for row in self._assignment.rows if row.row in self._missing]
        lengths = [self._known_lengths.get(row.row) or _bound(row, profile) for row in missing]
        return RowBounds(
            longest=max((length.tokens for length in lengths), default=1),
            longest_prompt=max((length.prompt_tokens for length in lengths), default=1),
            shortest=min((length.tokens for length in lengths), default=1),
            count=len(missing),
            are_sampled=not all(row.generation.is_greedy for row in missing),
        )

    def _place(self, plan: RuntimePlan, profile: ModelProfile, bounds: RowBounds) -> Placement | Unplaceable:
        """Where this worker would run a plan of these rows now."""
        work = self._assignment
        return place(
            plan,
            profile,
            work.config,
            work.requirements,
            self._around.capabilities(),
            self._companions.beside(self._around.live(self._slot), bounds),
            bounds,
            micro_batch_limit=work.micro_batch_limit,
        )

    def _take_place(self, placed: Placement, profile: ModelProfile, bounds: RowBounds) -> bool:
        """Reserve the place and hand the plan to the runner; False where the attempt ended instead."""
        self._placement = placed
        longest = min(bounds.longest, profile.most_row_tokens or bounds.longest)
        is_partial = placed.longest_row_tokens is not None and placed.longest_row_tokens < longest
        self._too_long = Unplaceable(refused=placed.refused) if is_partial else None
        beside = self._companions.device_bytes(placed.device_id, bounds)
        self._slot.reserve(placed.device_id, placed.process_bytes + beside)
        return self._hand_over(profile, placed)

    def _hand_over(self, profile: ModelProfile, placement: Placement) -> bool:
        work, folder = self._assignment, self._slot.cache_folder
        missing = tuple(row for row in work.rows if row.row in self._missing)
        self._stalled, self._in_flight = False, ()
        try:
            self._found_running = not self._slot.ready_runner()
        except OSError as error:
            self._fail("runner_not_started", f"The runner could not be started: {error.strerror}")
            return False
        self._has_heard, self._heard_at = False, self._around.clock()
        self._slot.runner.send(
            Execute(
                plan_id=work.plan_id,
                attempt=work.attempt,
                model_dir=str((self._around.models_dir / profile.path).absolute()),
                cache_dir=str(folder.path) if folder else None,
                weights_dir=str(folder.weights_path) if folder else None,
                runtime_plan=self._plan,
                profile=profile,
                config=work.config,
                placement=placement,
                rows=missing,
                suspects=work.lone_crashes,
                adapter=self._companions.adapter,
                draft_dir=self._companions.draft_dir,
                draft_digest=self._companions.draft_digest,
            )
        )
        return True

    def _started(self) -> bool:
        """Tell the store that the work has begun, while the runner begins; with a warm model the claim has said so."""
        if self._assignment.is_started:
            return True
        started = self._insist(lambda: self._around.leases.start(self._lease.lease_id))
        if not started:
            self._lease.lose()
            self._ask_to_stop(Stopping.LOST)
        return True

    # --- what the runner says

    def _take(self, message: Message | Died, profile: ModelProfile) -> None:
        self._heard_at = self._around.clock()
        if isinstance(message, Died):
            self._bury(message, profile)
            return
        self._has_heard = self._has_heard or not isinstance(message, Hello)
        match message:
            case Loaded(seconds=seconds, was_warm=was_warm):
                if not self._measured_before:
                    self._measured |= {"load_seconds": seconds, "was_warm": was_warm}
                self._slot.warm_model = profile.digest
            case BatchStarted(rows=rows):
                self._in_flight = rows
                self._generating_since = self._generating_since or self._heard_at
            case BatchDone():
                self._collect(message)
            case SpecializationFailed():
                self._fall_back(message, profile)
            case AttemptFailed():
                self._end_unless_stopping(lambda: self._fail(message.code, message.message, is_permanent=message.is_permanent))
            case Finished(measured=measured, too_long=too_long):
                self._measured |= both(self._measured_before, measured)
                self._in_flight = ()
                if not self._place_again(too_long, profile):
                    self._conclude()
            case Stopped():
                self._in_flight = ()
                self._conclude()

    def _collect(self, done: BatchDone) -> None:
        self._in_flight = ()
        self._measured |= both(self._measured_before, done.measured)
        if done.outcomes:
            self._measured["passes"] = {pass_id.value: describe(outcome) for pass_id, outcome in done.outcomes.items()}
        if self._report is None:
            try:
                finalized = finalize(self._plan, done.outcomes, self._details())
            except ValueError as error:
                self._slot.runner.kill()
                self._fail("runner_protocol", f"The runner's account of its passes is wrong: {error}")
                return
            self._report = AttemptReport(runtime_plan=finalized, placement=to_json(self._placement))
        waiting = {result.row for result in self._waiting}
        fresh = [result for result in done.results if result.row in self._missing - waiting]
        self._waiting += fresh
        self._count(result.row for result in fresh if result.error is None)
        self._tokens += sum(result.completion_tokens for result in fresh)
        self._record()

    def _count(self, rows: Iterable[int]) -> None:
        """Count what answered rows brought and what they might have taken: what quotes are made of."""
        for row in map(self._rows.__getitem__, rows):
            self._answered["prompt_bytes"] += prompt_bytes(request_of(row))
            self._answered["allowed_tokens"] += row.generation.max_new_tokens

    def _fall_back(self, failed: SpecializationFailed, profile: ModelProfile) -> None:
        """Go on with the generic backend, or fail with what the pass said, where that may not be or has no room here.

        A decline would cost nothing, so that the same pass would fail here again and again.
        """
        if self._stopping is not None:
            self._conclude()
            return
        work = self._assignment
        outcome: RuntimePlan | CannotFallBack = CannotFallBack(reason="rows were answered already")
        if self._report is None:
            demanded = demanded_passes(self._plan, work.config)
            outcome = fall_back(
                self._plan, work.config, failed.outcomes, reason=failed.reason, error_type=failed.error_type, demanded=demanded
            )
        if isinstance(outcome, CannotFallBack):
            self._fail("pass_failed", f"{failed.reason} (no fallback: {outcome.reason})", outcomes=failed.outcomes)
            return
        bounds = self._bounds(profile)
        placed = self._place(outcome, profile, bounds)
        if isinstance(placed, Unplaceable):
            message = f"{failed.reason} (the fallback to {outcome.backend_id} does not fit here: {placed.reason})"
            self._fail("pass_failed", message, outcomes=failed.outcomes)
            return
        _log.info("fallback", extra={"plan_id": work.plan_id, "reason": failed.reason})
        self._plan = outcome
        self._take_place(placed, profile, bounds)

    def _place_again(self, too_long: Sequence[LongRow], profile: ModelProfile) -> bool:
        """Rows may be longer than any bound knew, by what their model's chat template writes itself: make room for those.

        False where there are none: all are answered, what was said before was no help, or rows were left as their bounds had it.
        """
        new = [row for row in too_long if row.row not in self._known_lengths]
        if self._too_long is not None:
            new = [row for row in new if row.tokens > _bound(self._rows[row.row], profile).tokens]
        if self._stopping is not None or not new:
            return False
        self._flush()
        if self._lease.is_lost(self._around.clock()) or self._waiting:
            return False
        self._known_lengths |= {row.row: row for row in too_long}
        self._measured_before = dict(self._measured)
        bounds = self._bounds(profile)
        placed = self._place(self._plan, profile, bounds)
        if isinstance(placed, Unplaceable):
            most = max(row.tokens for row in too_long)
            self._fail("rows_missing", f"{len(new)} rows have up to {most:,} tokens, for which there is no room: {placed.reason}")
        else:
            self._take_place(placed, profile, bounds)
        return True

    def _bury(self, died: Died, profile: ModelProfile) -> None:
        self._slot.warm_model = None
        cause = f"no sign of life for {self._around.patience.stall:g} s" if self._stalled else died.cause
        rows, self._in_flight = self._in_flight, ()
        if self._stopping is not None:
            self._conclude()
        elif self._found_running and not self._has_heard and self._placement is not None:
            # It died idle, before it saw this plan: no fault of the plan's.
            self._hand_over(profile, self._placement)
        elif rows:
            self._flush()
            self._hand_back(Ending.CRASHED, lambda: self._around.leases.crash(self._lease.lease_id, rows, cause))
        else:
            self._flush()
            if not self._missing:
                self._ending = Ending.FINISHED
                return
            code = "runner_died" if "load_seconds" in self._measured else "runner_died_loading"
            self._fail(code, f"The runner died: {cause}")

    # --- what time does

    def _watch(self) -> None:
        """Look at the clock, the lease and the worker's own end."""
        around, now = self._around, self._around.clock()
        self._lease.attended(now)
        if self._missing and self._lease.is_lost(now):
            self._ask_to_stop(Stopping.LOST)
        elif self._lease.is_cancelled:
            self._ask_to_stop(Stopping.CANCEL)
        elif around.must_release():
            self._ask_to_stop(Stopping.DRAIN)
        if self._stopping is not None:
            self._escalate(now)
        elif now - self._heard_at > around.patience.stall and not self._stalled:
            self._stalled = True
            self._slot.runner.kill()
        if self._waiting and now >= self._retry_at:
            self._record()

    def _ask_to_stop(self, why: Stopping) -> None:
        order = list(Stopping)
        if self._stopping is None:
            _log.info("stopping", extra={"plan_id": self._assignment.plan_id, "why": why.value})
            self._stopping = (why, self._around.clock())
            self._slot.runner.send(Stop())
        elif order.index(why) > order.index(self._stopping[0]):
            self._stopping = (why, self._stopping[1])

    def _escalate(self, now: float) -> None:
        if self._stopping is None:
            return
        why, since = self._stopping
        patience = self._around.patience
        if self._around.must_hurry() or now - since >= (patience.kill_when_lost if why is Stopping.LOST else patience.kill):
            self._slot.runner.kill()
        elif now - since >= patience.terminate and not self._has_terminated:
            self._has_terminated = True
            self._slot.runner.terminate()

    # --- handing in and handing back

    def _record(self) -> None:
        """Hand in what waits, if the lease may still be trusted; when the database is away it goes on waiting."""
        now = self._around.clock()
        if not self._waiting or not self._lease.may_record(now):
            return
        batch = list(self._waiting)
        is_last = len(batch) == len(self._missing)
        report = self._newest_report() if is_last or not self._has_reported else None
        try:
            recorded = self._around.leases.record(self._lease.lease_id, batch, report)
        except DatabaseUnavailable as error:
            self._retry_at = self._around.clock() + RETRY_RECORD_SECONDS
            _log.warning("record-waits", extra={"plan_id": self._assignment.plan_id, "rows": len(batch), "error": str(error)})
            return
        if isinstance(recorded, LeaseLost):
            self._lease.lose()
            self._waiting.clear()
            return
        self._has_reported = True
        self._waiting = self._waiting[len(batch) :]
        self._missing = set() if recorded.is_finished else self._missing - {result.row for result in batch}

    def _flush(self) -> None:
        """Record what waits before the plan is handed back, as long as that may succeed."""
        self._insist(self._record_once)

    def _record_once(self) -> None:
        self._record()
        if self._waiting and self._lease.may_record(self._around.clock()):
            raise DatabaseUnavailable

    def _conclude(self) -> None:
        """The runner is at rest: see what is left to do."""
        self._flush()
        if not self._missing:
            self._ending = Ending.FINISHED
        elif self._lease.is_lost(self._around.clock()) or self._waiting:
            self._ending = Ending.LOST
        elif self._stopping is not None:
            reason = "cancelled" if self._stopping[0] is Stopping.CANCEL else "worker-stops"
            self._hand_back(Ending.RELEASED, lambda: self._around.leases.release(self._lease.lease_id, reason=reason))
        elif self._too_long is not None:
            self._decline(f"{len(self._missing)} long rows do not fit: {self._too_long.reason}")
        else:
            self._fail("rows_missing", f"The runner left {len(self._missing)} rows unanswered.")

    def _end_unless_stopping(self, end: Callable[[], None]) -> None:
        if self._stopping is not None:
            self._conclude()
        else:
            self._flush()
            end()

    def _decline(self, reason: str) -> Ending:
        self._hand_back(
            Ending.DECLINED, lambda: self._around.leases.release(self._lease.lease_id, reason=reason, decline_ms=DECLINE_MS)
        )
        return self._ending or Ending.LOST

    def _fail(
        self, code: str, message: str, *, is_permanent: bool = False, outcomes: Mapping[PassId, PassOutcome] | None = None
    ) -> None:
        if outcomes:
            self._measured["passes"] = {pass_id.value: describe(outcome) for pass_id, outcome in outcomes.items()}
        failure = Failure(code=code, message=message, is_permanent=is_permanent)
        report = self._newest_report()
        self._hand_back(Ending.FAILED, lambda: self._around.leases.fail(self._lease.lease_id, failure, report))

    def _hand_back(self, ending: Ending, verb: Callable[[], object]) -> None:
        done = self._insist(verb)
        self._ending = Ending.LOST if done is None or isinstance(done, LeaseLost) else ending

    def _insist(self, verb: Callable[[], T]) -> T | None:
        """Repeat while the database is away; None once the lease is too old to be trusted. The verbs can be repeated."""
        while self._lease.may_record(self._around.clock()):
            try:
                return verb()
            except DatabaseUnavailable:
                self._lease.attended(self._around.clock())
                self._slot.pause(RETRY_RECORD_SECONDS)
        return None

    # --- what is told about the attempt

    def _newest_report(self) -> AttemptReport:
        report = self._report or AttemptReport(
            runtime_plan=self._plan, placement=to_json(self._placement) if self._placement is not None else {}
        )
        measured = self._measured | self._answered
        if self._placement is not None:
            devices = {device.device_id: device.name for device in self._around.capabilities().devices}
            measured |= {"device": devices.get(self._placement.device_id), "backend": self._plan.backend_id}
        if self._generating_since is not None and self._tokens:
            seconds = max(1e-3, self._around.clock() - self._generating_since)
            measured |= {"generation_seconds": round(seconds, 3), "tokens_per_second": round(self._tokens / seconds, 3)}
        return replace(report, measured=measured)

    def _details(self) -> dict[str, str]:
        placement = self._placement
        if placement is None:
            return {}
        chosen = {"device": placement.device_id, "placement_tier": placement.tier, "micro_batch": str(placement.micro_batch)}
        return {**placement.kv_details, **chosen}


def both(before: Mapping[str, Any], now: Mapping[str, float]) -> dict[str, float]:
    """What two rounds of one attempt have measured together: the larger peak, and of all else the sum."""
    found = dict(now)
    for name, value in now.items():
        known = before.get(name)
        if isinstance(known, int | float):
            found[name] = max(known, value) if name.startswith(("peak_", "largest_")) else known + value
    if "tokens_per_second" in before and found.get("generate_seconds"):
        found["tokens_per_second"] = found.get("completion_tokens", 0.0) / found["generate_seconds"]
    return found


def _bound(row: WorkRow, profile: ModelProfile) -> LongRow:
    """How long a row may be, as far as one can tell without its tokens."""
    prompt_tokens = most_prompt_tokens(request_of(row), profile.most_image_tokens)
    return LongRow(row=row.row, prompt_tokens=prompt_tokens, tokens=prompt_tokens + row.generation.max_new_tokens)


def request_of(row: WorkRow) -> dict[str, Any]:
    """What was asked for, as it was submitted."""
    return {"prompt": row.prompt, "messages": row.messages}
