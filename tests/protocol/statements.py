"""Which guarded statements does the lease protocol consist of, and how may each be weakened?

Every method is one transaction on one plan record: it returns the record after it, or None when its guard refused. The
class is a model of the store, small enough to be explored; `Rules` names each choice that the protocol makes, and a
mutant flips one of them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

FINAL = frozenset({"succeeded", "failed", "cancelled", "expired", "dead"})
HELD = frozenset({"leased", "running"})
PENDING, SUCCEEDED, FAILED, TWICE = ".sf2"
MOST_LOSSES = MOST_FAILURES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The protocol's choices; the defaults are the protocol."""

    guard: Literal["lease and state", "lease", "state", "attempt"] = "lease and state"
    final_keeps_lease: bool = False
    one_result_a_row: bool = True
    counts_add: Literal["rows inserted", "rows sent"] = "rows inserted"
    last_record_finishes: bool = True
    release_heeds_cancel: bool = True
    fail_heeds_cancel: bool = True
    reap_heeds_cancel: bool = True
    claim_heeds_cancel: bool = True
    cancel_is_one_statement: bool = True
    losses_reset: Literal["by a new row", "never", "also by a release"] = "by a new row"
    cap_counts: Literal["failures", "attempts", "nothing"] = "failures"
    failure_excludes_node: bool = True
    decline_is_kept: bool = True
    decline_is_part_of_release: bool = True
    decline_outlasts_polls: bool = True
    crash_is_remembered: bool = True
    hang_is_noticed: bool = True
    renewal_names: Literal["leases", "worker"] = "leases"
    start_is_idempotent: bool = True
    lost_claim_is_looked_up: bool = True
    replans: Literal["until up to date", "once"] = "until up to date"
    answered_plan_is_born_final: bool = True
    attempts_only_grow: bool = True
    polls: bool = True
    sweeps: bool = True


class Plan(NamedTuple):
    """A plan record. `rows` has one sign a row; `excluded` and `alone` are bit sets of nodes and rows.

    The last three are known to the checker only: a cancel was acknowledged, losses since a row was recorded, the highest
    attempt number ever given.
    """

    state: str = "new"
    rows: str = ".."
    lease: int | None = None
    worker: int | None = None
    succeeded: int = 0
    failed: int = 0
    losses: int = 0
    failures: int = 0
    backs_off: bool = False
    cancel_requested: bool = False
    excluded: int = 0
    batch_limit: int = 2
    alone: int = 0
    attempt: int = 0
    inventory: int = 0
    promised: bool = False
    barren: int = 0
    highest: int = 0

    @property
    def is_final(self) -> bool:
        """Whether nothing may change it any more."""
        return self.state in FINAL

    @property
    def pending(self) -> tuple[int, ...]:
        """The rows without a result."""
        return tuple(row for row, sign in enumerate(self.rows) if sign == PENDING)


class Statements:
    """The statements under a set of rules."""

    def __init__(self, rules: Rules, *, counts_attempts: bool) -> None:
        self.rules = rules
        self._counts_attempts = counts_attempts

    def submit(self, plan: Plan, invalid: int) -> Plan:
        """Insert it; the first `invalid` rows are wrong by themselves and get their error at once."""
        plan = plan._replace(state="queued", rows=FAILED * invalid + plan.rows[invalid:], failed=invalid)
        if not plan.pending and self.rules.answered_plan_is_born_final:
            return self.end(plan, "succeeded")
        return plan

    def is_claimable(self, plan: Plan, node: int, inventory: int) -> bool:
        """The claim's WHERE clause, for a worker on that node."""
        return (
            plan.state == "queued"
            and not plan.backs_off
            and not plan.excluded >> node & 1
            and not (plan.cancel_requested and self.rules.claim_heeds_cancel)
            and plan.inventory == inventory
        )

    def claim(self, plan: Plan, lease: int, worker: int) -> Plan:
        """Lease it; call it only when it is claimable."""
        attempt = min(plan.attempt + 1, 9) if self._counts_attempts else 0
        holder = worker if self.rules.renewal_names == "worker" else None
        highest = max(attempt, plan.highest)
        return plan._replace(state="leased", lease=lease, worker=holder, attempt=attempt, highest=highest)

    def accepts(self, plan: Plan, lease: int | None, attempt: int) -> bool:
        """The guard of every write by a worker."""
        held = plan.state in HELD
        match self.rules.guard:
            case "lease and state":
                return held and plan.lease == lease
            case "lease":
                return plan.lease == lease
            case "state":
                return held
            case "attempt":
                return held and plan.attempt == attempt

    def start(self, plan: Plan) -> Plan | None:
        """Say that work began; saying it again, after a lost reply, changes nothing."""
        if plan.state == "running" and not self.rules.start_is_idempotent:
            return None
        return plan._replace(state="running")

    def record(self, plan: Plan, batch: tuple[int, ...], *, sign: str = SUCCEEDED) -> Plan:
        """Write results; only rows that had none count, and the last one ends the plan."""
        plan, fresh = self._answer(plan, batch, sign)
        if fresh:
            losses = plan.losses if self.rules.losses_reset == "never" else 0
            plan = plan._replace(losses=losses, failures=0, barren=0)
        if not plan.pending and self.rules.last_record_finishes:
            return self.end(plan, "succeeded")
        return plan

    def _answer(self, plan: Plan, batch: tuple[int, ...], sign: str) -> tuple[Plan, int]:
        signs, fresh = list(plan.rows), 0
        for row in batch:
            fresh += signs[row] == PENDING
            signs[row] = sign if signs[row] == PENDING else signs[row] if self.rules.one_result_a_row else TWICE
        count = fresh if self.rules.counts_add == "rows inserted" else len(batch)
        field = "succeeded" if sign == SUCCEEDED else "failed"
        return plan._replace(rows="".join(signs), **{field: getattr(plan, field) + count}), fresh

    def release(self, plan: Plan, *, declined_by: int | None = None) -> Plan:
        """Hand it back, nothing burned; a decline keeps its node away for a while."""
        if declined_by is not None and self.rules.decline_is_kept and self.rules.decline_is_part_of_release:
            plan = self.exclude(plan, declined_by)
        losses = 0 if self.rules.losses_reset == "also by a release" else plan.losses
        attempt = plan.attempt if self.rules.attempts_only_grow else max(plan.attempt - 1, 0)
        return self._requeue(plan, self.rules.release_heeds_cancel, losses=losses, attempt=attempt)

    def exclude(self, plan: Plan, node: int) -> Plan:
        """Keep that node away for a while."""
        return plan._replace(excluded=plan.excluded | 1 << node)

    def fail(self, plan: Plan, node: int, *, is_permanent: bool) -> Plan:
        """The attempt failed; retry later and elsewhere, up to the cap."""
        count = {"failures": plan.failures + 1, "attempts": plan.attempt, "nothing": 0}[self.rules.cap_counts]
        heeds = self.rules.fail_heeds_cancel
        if (is_permanent or count >= MOST_FAILURES) and not (plan.cancel_requested and heeds):
            return self.end(plan, "failed")
        if self.rules.failure_excludes_node:
            plan = self.exclude(plan, node)
        failures = 0 if self.rules.cap_counts == "nothing" else plan.failures + 1
        return self._requeue(plan, heeds, failures=failures, backs_off=True)

    def crash(self, plan: Plan, batch: tuple[int, ...]) -> Plan:
        """The runner died under this micro-batch; a row that dies alone for the second time gets that as its error."""
        if not self.rules.crash_is_remembered:
            return self._requeue(plan, self.rules.fail_heeds_cancel)
        if len(batch) > 1:
            plan = plan._replace(batch_limit=max(1, len(batch) // 2))
        elif not plan.alone >> batch[0] & 1:
            plan = plan._replace(alone=plan.alone | 1 << batch[0])
        else:
            plan = self.record(plan, batch, sign=FAILED)
            plan = plan if plan.is_final else plan._replace(batch_limit=len(plan.rows))
        return plan if plan.is_final else self._requeue(plan, self.rules.fail_heeds_cancel)

    def reap(self, plan: Plan) -> Plan:
        """Its lease ran out."""
        gives_up = plan.losses + 1 >= MOST_LOSSES
        if gives_up and not (plan.cancel_requested and self.rules.reap_heeds_cancel):
            return self.end(plan, "dead")
        barren = min(plan.barren + 1, MOST_LOSSES)
        return self._requeue(plan, self.rules.reap_heeds_cancel, losses=plan.losses + 1, barren=barren)

    def cancel(self, plan: Plan) -> Plan:
        """One statement: a queued plan ends, a held one is flagged; a final one stays."""
        if plan.is_final:
            return plan
        if plan.state == "queued":
            return self.end(plan, "cancelled")
        return plan._replace(cancel_requested=True, promised=True)

    def end(self, plan: Plan, state: str) -> Plan:
        """A final state: rows without a result get its name as their error, and whatever only a retry needs is dropped."""
        return Plan(
            state=state,
            rows=plan.rows.replace(PENDING, FAILED),
            lease=plan.lease if self.rules.final_keeps_lease else None,
            succeeded=plan.succeeded,
            failed=plan.failed + len(plan.pending),
            attempt=plan.attempt,
            highest=plan.highest,
        )

    def _requeue(self, plan: Plan, heeds_cancel: bool, **changes: object) -> Plan:
        if plan.cancel_requested and heeds_cancel:
            return self.end(plan, "cancelled")
        return plan._replace(state="queued", lease=None, worker=None)._replace(**changes)  # type: ignore[arg-type]  # a field map
