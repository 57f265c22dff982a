"""Who takes which step of the lease protocol when: workers, coordinators, users and every fault, as a state space to explore.

Modelled: two workers on two nodes with a slot each; polls and hints; kills, freezes past the lease, drains, runner
crashes, hangs, transient and permanent failures, lost commit replies, lost and doubled hints, inventory changes, a
failover that loses the newest commit; poison rows, full and broken nodes; cancels and deadlines. Time is abstract: a
lease runs out exactly when nobody renews it, a back-off ends at any moment. Leases are small tokens, fresh at each claim.
Left out: seconds, priorities, tenants, slots, SQL.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.protocol.explorer import Explorer, Step, Verdict
from tests.protocol.statements import FAILED, HELD, MOST_LOSSES, PENDING, SUCCEEDED, TWICE, Plan, Rules, Statements


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What may happen: at most `budget` of the named faults; `harmless` says that nothing here may give a good row an error."""

    plans: tuple[str, ...] = ("..",)
    faults: frozenset[str] = frozenset()
    budget: int = 0
    cancels: bool = False
    deadlines: bool = False
    poison: frozenset[int] = frozenset()
    poison_kills_worker: bool = False
    full: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    invalid_rows: bool = False
    hints: bool = False
    counts_attempts: bool = False
    harmless: bool = False


class Worker(NamedTuple):
    """A worker process and what it believes; `todo` and `batch` are row numbers, `lease` is what it would write with."""

    life: str = "up"
    phase: str = "idle"
    plan: int = 0
    lease: int | None = None
    todo: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    batch_limit: int = 2
    attempt: int = 0


class State(NamedTuple):
    """Everything; `before` is the database before its newest commit (for failovers), `cancelling` a half-done cancel."""

    plans: tuple[Plan, ...]
    workers: tuple[Worker, ...] = (Worker(), Worker())
    hinted: bool = False
    inventory: int = 0
    budget: int = 0
    cancelling: int | None = None
    before: tuple[Plan, ...] | None = None


class LeaseModel:
    """The steps out of any state, under the rules, in a world."""

    def __init__(self, world: World, rules: Rules) -> None:
        self.world, self.rules = world, rules
        self.sql = Statements(rules, counts_attempts=world.counts_attempts)

    def explore(self) -> Verdict:
        """Every reachable state, or the first violation."""
        longest = max(len(rows) for rows in self.world.plans)
        start = State(plans=tuple(Plan(rows=rows, batch_limit=longest) for rows in self.world.plans), budget=self.world.budget)
        return Explorer(
            start, self.steps, judge=self.judge, is_done=lambda state: all(plan.is_final for plan in state.plans)
        ).run()

    def steps(self, state: State) -> Iterator[Step]:
        """All of them."""
        for number, plan in enumerate(state.plans):
            if plan.state == "new":
                yield from self._submissions(state, number, plan)
            elif not plan.is_final:
                yield from self._coordinator(state, number, plan)
                yield from self._user(state, number, plan)
            if state.cancelling == number:
                yield self._second_half_of_cancel(state, number, plan)
        yield from self._surroundings(state)
        for node, worker in enumerate(state.workers):
            yield from self._process(state, node, worker)

    def judge(self, state: State, step: Step) -> str | None:
        """The safety promises, for one transition."""
        after = step.target
        assert isinstance(after, State)
        for old, new in zip(state.plans, after.plans, strict=True):
            if old is new:
                continue
            if old.is_final and step.verb != "fails over":
                return f"the final state {old.state} changed"
            if TWICE in new.rows:
                return "a row has two results"
            if (new.succeeded, new.failed) != (new.rows.count(SUCCEEDED), new.rows.count(FAILED)):
                return "the stored counts are not the rows"
            if new.state == "queued" and not new.pending:
                return "an answered plan is queued"
            if new.is_final and new.pending:
                return "a final plan has rows without a result"
            if self.world.harmless and any(sign == FAILED and row not in self.world.poison for row, sign in enumerate(new.rows)):
                return "a row that nothing is wrong with got an error"
        return None

    def _can(self, state: State, fault: str) -> bool:
        return state.budget > 0 and fault in self.world.faults

    def _put(self, state: State, number: int, plan: Plan, **changes: object) -> State:
        """The state after a commit that wrote this plan."""
        plans = (*state.plans[:number], plan, *state.plans[number + 1 :])
        if "failover" in self.world.faults:
            changes["before"] = state.plans
        return state._replace(plans=plans)._replace(**changes)  # type: ignore[arg-type]  # a field map

    # --- the coordinator, the user and the surroundings

    def _submissions(self, state: State, number: int, plan: Plan) -> Iterator[Step]:
        for invalid in range(len(plan.rows) + 1 if self.world.invalid_rows else 1):
            inserted = self.sql.submit(plan, invalid)
            yield Step("api", "submits", self._put(state, number, inserted, hinted=self.world.hints), note=f"{invalid} bad")
            if self._can(state, "broker"):
                unhinted = self._put(state, number, inserted, budget=state.budget - 1)
                yield Step("api", "submits, dies before the hint", unhinted, "fault")

    def _coordinator(self, state: State, number: int, plan: Plan) -> Iterator[Step]:
        if plan.state in HELD and not self._is_renewed(state, plan):
            reaped = self.sql.reap(plan)
            early = reaped.state == "dead" and plan.barren + 1 < MOST_LOSSES
            wrong = "dead although a row was recorded between its losses" if early else None
            yield Step("coordinator", f"reaps {number}", self._put(state, number, reaped), wrong=wrong)
        if plan.backs_off:
            yield Step("clock", f"ends back-off {number}", self._put(state, number, plan._replace(backs_off=False)))
        if plan.excluded and plan.state == "queued" and self._exclusion_may_end(state, plan):
            yield Step("clock", f"ends exclusion {number}", self._put(state, number, plan._replace(excluded=0)))
        if self.rules.replans == "until up to date" and plan.state == "queued" and plan.inventory != state.inventory:
            current = plan._replace(inventory=state.inventory)
            yield Step("coordinator", f"replans {number}", self._put(state, number, current))

    def _is_renewed(self, state: State, plan: Plan) -> bool:
        alive = [worker for worker in state.workers if worker.life in ("up", "draining")]
        if any(worker.lease == plan.lease for worker in alive):
            return True
        return plan.worker is not None and state.workers[plan.worker] in alive

    def _exclusion_may_end(self, state: State, plan: Plan) -> bool:
        """An exclusion outlasts the back-off and several polls of whoever else could take the plan."""
        if not self.rules.decline_outlasts_polls:
            return True
        taker = any(self._may_claim(state, node, worker, plan) for node, worker in enumerate(state.workers))
        return not plan.backs_off and not taker

    def _user(self, state: State, number: int, plan: Plan) -> Iterator[Step]:
        if self.world.deadlines:
            yield Step("clock", f"expires {number}", self._put(state, number, self.sql.end(plan, "expired")), "wish")
        if not self.world.cancels or plan.promised or state.cancelling is not None:
            return
        if self.rules.cancel_is_one_statement or plan.state == "queued":
            yield Step("user", f"cancels {number}", self._put(state, number, self.sql.cancel(plan)), "wish")
        else:
            yield Step("user", f"cancels {number}, first half", state._replace(cancelling=number), "wish")

    def _second_half_of_cancel(self, state: State, number: int, plan: Plan) -> Step:
        flagged = plan if plan.is_final else plan._replace(cancel_requested=plan.state in HELD, promised=True)
        return Step("user", f"cancels {number}, second half", self._put(state, number, flagged, cancelling=None))

    def _surroundings(self, state: State) -> Iterator[Step]:
        spent = state.budget - 1
        if self.world.hints:
            if self.rules.sweeps and not state.hinted and any(plan.state == "queued" for plan in state.plans):
                yield Step("coordinator", "sweeps", state._replace(hinted=True))
            idle = not any(
                self._may_claim(state, node, worker, plan) for node, worker in enumerate(state.workers) for plan in state.plans
            )
            if state.hinted and idle:
                yield Step("broker", "drops a stale hint", state._replace(hinted=False))
            if self._can(state, "broker"):
                verb = "loses hints" if state.hinted else "doubles a hint"
                yield Step("broker", verb, state._replace(hinted=not state.hinted, budget=spent), "fault")
        if self._can(state, "inventory") and not state.inventory:
            plans = state.plans
            if self.rules.replans == "once":
                plans = tuple(plan._replace(inventory=1) if plan.state == "queued" else plan for plan in plans)
            yield Step("fleet", "changes its models", state._replace(plans=plans, inventory=1, budget=spent), "fault")
        if self._can(state, "failover") and state.before not in (None, state.plans):
            assert state.before is not None
            lost = state._replace(plans=state.before, before=None, budget=spent)
            yield Step("database", "fails over", lost, "fault", "newest commit lost")

    # --- a worker process

    def _may_claim(self, state: State, node: int, worker: Worker, plan: Plan) -> bool:
        if worker.life != "up" or worker.phase != "idle" or not (self.rules.polls or state.hinted):
            return False
        return self.sql.is_claimable(plan, node, state.inventory)

    def _with(self, state: State, node: int, worker: Worker) -> State:
        workers = (*state.workers[:node], worker, *state.workers[node + 1 :])
        return state._replace(workers=workers)

    def _process(self, state: State, node: int, worker: Worker) -> Iterator[Step]:
        actor, spent = f"worker {node}", state.budget - 1
        if worker.life == "down":
            yield Step(actor, "restarts", self._with(state, node, Worker()))
            return
        if self._can(state, "kill"):
            yield Step(actor, "is killed", self._dead(state, node)._replace(budget=spent), "fault")
        if worker.life == "frozen":
            yield Step(actor, "thaws", self._with(state, node, worker._replace(life="up")))
            yield Step(actor, "thaws and drops its work", self._with(state, node, Worker()))
            return
        if self._can(state, "drain") and worker.life == "up":
            draining = self._with(state, node, worker._replace(life="draining"))
            yield Step(actor, "is told to drain", draining._replace(budget=spent), "fault")
        if worker.phase == "idle":
            if worker.life == "draining":
                yield Step(actor, "exits", self._dead(state, node))
            for number, plan in enumerate(state.plans):
                if self._may_claim(state, node, worker, plan):
                    yield from self._claims(state, node, worker, number, plan)
        elif worker.phase == "unsure of its claim":
            yield self._looks_up(state, node, worker)
        else:
            yield from Holding(self, state, node, worker).steps()

    def _dead(self, state: State, node: int) -> State:
        state = self._with(state, node, Worker(life="down"))
        plans = tuple(plan._replace(worker=None) if plan.worker == node else plan for plan in state.plans)
        return state._replace(plans=plans)

    def _claims(self, state: State, node: int, worker: Worker, number: int, plan: Plan) -> Iterator[Step]:
        known = {plan.lease for plan in (*state.plans, *(state.before or ()))}
        known |= {other.lease for other in state.workers}
        lease = next(token for token in range(9) if token not in known)
        leased = self.sql.claim(plan, lease, node)
        wrong = None
        if plan.promised:
            wrong = "claimed after an acknowledged cancel"
        elif self.world.counts_attempts and leased.attempt <= plan.highest < 9:
            wrong = "an attempt number was used again"
        holder = worker._replace(
            phase="claimed",
            plan=number,
            lease=lease,
            todo=plan.pending,
            batch_limit=plan.batch_limit,
            attempt=leased.attempt,
        )
        after = self._put(state, number, leased, hinted=False)
        yield Step(f"worker {node}", f"claims {number}", self._with(after, node, holder), wrong=wrong)
        if self._can(state, "lost reply"):
            unsure = self._with(after, node, holder._replace(phase="unsure of its claim"))
            unsure = unsure._replace(budget=state.budget - 1)
            yield Step(f"worker {node}", f"claims {number}", unsure, "fault", "reply lost", wrong)

    def _looks_up(self, state: State, node: int, worker: Worker) -> Step:
        known = self.rules.lost_claim_is_looked_up and state.plans[worker.plan].lease == worker.lease
        becomes = worker._replace(phase="claimed") if known else Worker(life=worker.life)
        return Step(f"worker {node}", "asks by lease" if known else "has no claim", self._with(state, node, becomes))


class Holding:
    """The steps of a worker that believes it holds a plan."""

    def __init__(self, model: LeaseModel, state: State, node: int, worker: Worker) -> None:
        self._model, self._state, self._node, self._worker = model, state, node, worker
        self._world, self._rules, self._sql = model.world, model.rules, model.sql
        self._plan = state.plans[worker.plan]
        self._is_holder = self._plan.state in HELD and self._plan.lease == worker.lease

    def steps(self) -> Iterator[Step]:
        """Faults, the renewal's answer, and what its phase asks for."""
        worker, sql = self._worker, self._sql
        yield from self._faults()
        if not self._is_holder:
            yield self._becomes("finds its lease lost", Worker(life=worker.life))
        elif self._plan.cancel_requested:
            yield from self._writes("releases, cancelled", sql.release)
        if worker.life == "draining":
            yield from self._writes("releases, draining", sql.release)
        match worker.phase:
            case "claimed":
                yield from self._begins()
            case "running":
                yield from self._generates()
            case "generated":
                yield from self._records()
            case "between record and finish":
                yield from self._writes("finishes", lambda plan: sql.end(plan, "succeeded"))
            case "crashed":
                yield from self._writes("reports a crash", lambda plan: sql.crash(plan, worker.batch))
            case "failing" | "refused":
                permanent = worker.phase == "refused"
                yield from self._writes("fails", lambda plan: sql.fail(plan, self._node, is_permanent=permanent))
            case "hanging" if self._rules.hang_is_noticed:
                yield self._becomes("kills its hung runner", worker._replace(phase="crashed" if worker.batch else "failing"))

    def _becomes(self, verb: str, worker: Worker) -> Step:
        return Step(f"worker {self._node}", verb, self._model._with(self._state, self._node, worker))

    def _writes(self, verb: str, statement: Callable[[Plan], Plan | None], then: Worker | None = None) -> Iterator[Step]:
        """One guarded transaction. When its reply is lost the worker, none the wiser, will try it again."""
        model, state, actor, worker = self._model, self._state, f"worker {self._node}", self._worker
        accepted = self._sql.accepts(self._plan, worker.lease, worker.attempt)
        written = statement(self._plan) if accepted else None
        if written is None:
            yield Step(actor, verb, model._with(state, self._node, Worker(life=worker.life)), note="refused")
            return
        wrong = None if self._is_holder else "a write was accepted from a worker that does not hold the lease"
        after = model._put(state, worker.plan, written)
        yield Step(actor, verb, model._with(after, self._node, then or Worker(life=worker.life)), wrong=wrong)
        if model._can(state, "lost reply"):
            yield Step(actor, verb, after._replace(budget=state.budget - 1), "fault", "reply lost", wrong)

    def _faults(self) -> Iterator[Step]:
        worker = self._worker

        def can(fault: str) -> bool:
            return self._model._can(self._state, fault)

        befalls: list[tuple[str, Worker]] = []
        if can("freeze") and worker.life == "up":
            befalls.append(("freezes", worker._replace(life="frozen")))
        if worker.phase in ("claimed", "running"):
            batch = worker.todo[: worker.batch_limit] if worker.phase == "running" else ()
            phases = (("transient", "failing"), ("permanent", "refused"), ("hang", "hanging"))
            befalls += [(f"meets a {fault}", worker._replace(phase=phase, batch=batch)) for fault, phase in phases if can(fault)]
        if worker.phase == "generated" and can("crash"):
            befalls.append(("loses its runner", worker._replace(phase="crashed")))
        for verb, becomes in befalls:
            step = self._becomes(verb, becomes)
            assert isinstance(step.target, State)
            yield step._replace(kind="fault", target=step.target._replace(budget=self._state.budget - 1))

    def _begins(self) -> Iterator[Step]:
        if self._node in self._world.full:
            kept_apart = self._rules.decline_is_kept and not self._rules.decline_is_part_of_release
            if kept_apart and not self._plan.is_final and not self._plan.excluded >> self._node & 1:
                noted = self._model._put(self._state, self._worker.plan, self._sql.exclude(self._plan, self._node))
                wrong = None if self._is_holder else "a decline was accepted from a worker without the lease"
                yield Step(f"worker {self._node}", "notes its decline", noted, wrong=wrong)
            else:
                yield from self._writes("declines", lambda plan: self._sql.release(plan, declined_by=self._node))
        elif self._node in self._world.broken:
            yield self._becomes("cannot load", self._worker._replace(phase="failing"))
        else:
            yield from self._writes("starts", self._sql.start, self._worker._replace(phase="running"))

    def _generates(self) -> Iterator[Step]:
        worker = self._worker
        if not worker.todo:
            yield from self._writes("releases, nothing left", self._sql.release)
        for size in range(1, min(worker.batch_limit, len(worker.todo)) + 1):
            batch = worker.todo[:size]
            if not self._world.poison & set(batch):
                yield self._becomes(f"generates {size}", worker._replace(phase="generated", batch=batch))
            elif self._world.poison_kills_worker:
                yield Step(f"worker {self._node}", f"dies of {size}", self._model._dead(self._state, self._node))
            else:
                yield self._becomes(f"crashes on {size}", worker._replace(phase="crashed", batch=batch))

    def _records(self) -> Iterator[Step]:
        worker, rules = self._worker, self._rules
        rest = tuple(row for row in worker.todo if row not in worker.batch)
        ends = not rest and not rules.last_record_finishes
        phase = "between record and finish" if ends else "running"
        then = worker._replace(phase=phase, todo=rest, batch=())
        if not rest and rules.last_record_finishes and all(self._plan.rows[row] == PENDING for row in worker.todo):
            then = Worker(life=worker.life)
        yield from self._writes("records", lambda plan: self._sql.record(plan, worker.batch), then)


def verdict_of(world: World, **flips: Any) -> Verdict:
    """Explore a world under the protocol with some of its rules flipped."""
    return LeaseModel(world, Rules(**flips)).explore()
