"""Which promise did this history break? Read after the fact, from the database and from what users were told.

The checker shares no code with what it checks: the states and their order are written down here again. It looks at

    acknowledged   every job whose submission was answered is there with all its rows, and, where asked, all of them answered
    once           a row has at most one result, under the plan that it was assigned to, and a cursor once read never changes
    counts         a job's and a plan's counts are those of their results
    cursors        a job's cursors are 1, 2, … without a gap
    writer         a result was written within the attempt whose number it carries; attempts of a plan do not overlap
    numbers        attempt numbers only grow, by one, and the plan knows the newest
    states         each event begins where the one before ended, nothing leaves a final state, the plan is where its events end
    placement      no attempt ran on a node that may not run it
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from tests.chaos.history import Acknowledged, History, Row

STATES = frozenset({"queued", "leased", "running"})
FINAL = frozenset({"succeeded", "failed", "cancelled", "expired", "dead"})
ALLOWED = frozenset(
    {
        ("queued", "leased"), ("queued", "cancelled"), ("queued", "expired"),
        ("leased", "running"), ("leased", "queued"), ("running", "queued"),
        *((held, final) for held in ("leased", "running") for final in FINAL),
    }
)  # fmt: skip


def violations(history: History, acknowledged: Mapping[str, Acknowledged], *, must_be_complete: bool = True) -> list[str]:
    """Every broken promise in words; none when all is well."""
    found = [
        *_lost(history, acknowledged, must_be_complete),
        *_reread(history, acknowledged),
        *_misplaced(history, acknowledged),
        *(problem for check in _CHECKS for problem in check(history)),
    ]
    return list(found)


def _lost(history: History, acknowledged: Mapping[str, Acknowledged], must_be_complete: bool) -> Iterator[str]:
    jobs = {job["id"]: job for job in history.jobs}
    rows = Counter(row["job_id"] for row in history.rows)
    answered = Counter(result["job_id"] for result in history.results)
    for job_id, told in acknowledged.items():
        if job_id not in jobs:
            yield f"{job_id} was acknowledged and is gone"
            continue
        if not rows[job_id] == jobs[job_id]["row_count"] == told.row_count:
            yield f"{job_id} was acknowledged with {told.row_count} rows and has {rows[job_id]}"
        if must_be_complete and answered[job_id] != told.row_count:
            yield f"{job_id} has {answered[job_id]} results for {told.row_count} rows"


def _reread(history: History, acknowledged: Mapping[str, Acknowledged]) -> Iterator[str]:
    stored = {(result["job_id"], result["seq"]): (result["row"], result["text"]) for result in history.results}
    for job_id, told in acknowledged.items():
        for cursor, seen in told.seen.items():
            if stored.get((job_id, cursor)) != seen:
                yield f"{job_id}: cursor {cursor} was read as {seen} and is {stored.get((job_id, cursor))}"


def _misplaced(history: History, acknowledged: Mapping[str, Acknowledged]) -> Iterator[str]:
    jobs = {plan["id"]: plan["job_id"] for plan in history.plans}
    for attempt in history.attempts:
        told = acknowledged.get(jobs[attempt["plan_id"]])
        if told is not None and told.nodes and attempt["worker_node"] not in told.nodes:
            yield f"{attempt['plan_id']}: attempt {attempt['number']} ran on {attempt['worker_node']}, which may not run it"


def _results_once(history: History) -> Iterator[str]:
    assigned = {(row["job_id"], row["row"]): row["plan_id"] for row in history.rows}
    for (job_id, row), times in Counter((result["job_id"], result["row"]) for result in history.results).items():
        if times > 1:
            yield f"{job_id}: row {row} has {times} results"
        if (job_id, row) not in assigned:
            yield f"{job_id}: a result for row {row}, which it does not have"
    for result in history.results:
        if assigned.get((result["job_id"], result["row"]), result["plan_id"]) != result["plan_id"]:
            yield f"{result['job_id']}: row {result['row']} was answered by {result['plan_id']}, which does not own it"


def _counts_sum(history: History) -> Iterator[str]:
    by_job, by_plan = _grouped(history.results, "job_id"), _grouped(history.results, "plan_id")
    for job in history.jobs:
        mine = by_job[job["id"]]
        failed = sum(result["error_code"] is not None for result in mine)
        tokens = [sum(result[name] for result in mine) for name in ("prompt_tokens", "completion_tokens")]
        if [job["succeeded"], job["failed"]] != [len(mine) - failed, failed]:
            yield f"{job['id']} counts {job['succeeded']} + {job['failed']}, its results say {len(mine) - failed} + {failed}"
        if [job["prompt_tokens"], job["completion_tokens"]] != tokens:
            yield f"{job['id']} counts other tokens than its results: {tokens}"
    for plan in history.plans:
        mine = by_plan[plan["id"]]
        failed = sum(result["error_code"] is not None for result in mine)
        if [plan["rows_done"], plan["rows_failed"]] != [len(mine), failed]:
            yield f"{plan['id']} counts {plan['rows_done']} rows ({plan['rows_failed']} failed), it has {len(mine)} ({failed})"
        if plan["state"] in FINAL and len(mine) != plan["row_count"]:
            yield f"{plan['id']} is {plan['state']} with {len(mine)} results for {plan['row_count']} rows"


def _cursors_are_dense(history: History) -> Iterator[str]:
    by_job = _grouped(history.results, "job_id")
    for job in history.jobs:
        cursors = sorted(result["seq"] for result in by_job[job["id"]])
        if cursors != list(range(1, len(cursors) + 1)):
            yield f"{job['id']}: its cursors have gaps or duplicates: {cursors}"
        if job["seq"] != len(cursors):
            yield f"{job['id']} is at cursor {job['seq']} with {len(cursors)} results"


def _writers_held_the_lease(history: History) -> Iterator[str]:
    attempts = {(attempt["plan_id"], attempt["number"]): attempt for attempt in history.attempts}
    for result in history.results:
        if result["error_code"] is not None:
            continue  # the end of a plan writes the errors of its remaining rows, whoever held it last
        attempt = attempts.get((result["plan_id"], result["attempt"]))
        if attempt is None:
            yield f"{result['plan_id']}: row {result['row']} carries attempt {result['attempt']}, which never was"
        elif not _within(result["created_ms"], attempt):
            yield f"{result['plan_id']}: row {result['row']} was written outside attempt {result['attempt']}"
    for plan_id, mine in _grouped(history.attempts, "plan_id").items():
        ordered = sorted(mine, key=lambda attempt: attempt["number"])
        for earlier, later in itertools.pairwise(ordered):
            if earlier["ended_ms"] is None or earlier["ended_ms"] > later["started_ms"]:
                yield f"{plan_id}: attempt {later['number']} began before attempt {earlier['number']} had ended"


def _numbers_grow(history: History) -> Iterator[str]:
    by_plan = _grouped(history.attempts, "plan_id")
    for plan in history.plans:
        numbers = [attempt["number"] for attempt in sorted(by_plan[plan["id"]], key=lambda attempt: attempt["started_ms"])]
        if sorted(numbers) != list(range(1, len(numbers) + 1)) or plan["attempt"] != len(numbers):
            yield f"{plan['id']} is at attempt {plan['attempt']} and had attempts {numbers}"
    for lease_id, times in Counter(attempt["lease_id"] for attempt in history.attempts).items():
        if times > 1:
            yield f"lease {lease_id} was used for {times} attempts"


def _states_follow_the_table(history: History) -> Iterator[str]:
    by_plan = _grouped(history.events, "plan_id")
    for plan in history.plans:
        state: str | None = None
        for event in by_plan[plan["id"]]:
            before, after = event["from_state"], event["to_state"]
            if after not in STATES | FINAL:
                continue  # something noted that moved nothing, or how far specialization has come
            if before != state:
                yield f"{plan['id']}: event {event['kind']} begins at {before}, the plan was {state}"
            if before is not None and before != after and (before, after) not in ALLOWED:
                yield f"{plan['id']}: {before} → {after} by {event['kind']} is not allowed"
            state = after
        if state != plan["state"]:
            yield f"{plan['id']} is {plan['state']}, its events end at {state}"
        if (plan["lease_id"] is not None) != (plan["state"] in {"leased", "running"}):
            yield f"{plan['id']} is {plan['state']} with lease {plan['lease_id']}"


_CHECKS: tuple[Callable[[History], Iterator[str]], ...] = (
    _results_once,
    _counts_sum,
    _cursors_are_dense,
    _writers_held_the_lease,
    _numbers_grow,
    _states_follow_the_table,
)


def _grouped(rows: Iterable[Row], key: str) -> defaultdict[str, list[Row]]:
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups


def _within(at_ms: int, attempt: Row) -> bool:
    """Whether it lies in the attempt. Both times are the database's, yet read by separate statements of one transaction."""
    return attempt["started_ms"] <= at_ms and (attempt["ended_ms"] is None or at_ms <= attempt["ended_ms"] + 1)
