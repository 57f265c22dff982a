"""What is known of workers, models and backlog?"""

from pathlib import PurePosixPath

from sqlalchemy import text

from ollm_service.core.capabilities import LiveState
from ollm_service.core.leasing import RowError, RowResult
from ollm_service.core.profile import ModelProfile
from ollm_service.store.database import Store
from ollm_service.store.engine import connect, parse_url
from ollm_service.store.fleet import MOST_COUNTED
from ollm_service.store.views import PlanView
from tests.store.ageing import let_time_pass
from tests.store.crowd import multiply_workers
from tests.store.samples import (
    DIGEST,
    FALLBACK,
    LIVE,
    PROFILE,
    REPORT,
    answers,
    capabilities,
    class_of,
    must_claim,
    new_job,
    new_lease,
    new_worker,
    plan_of,
    plans_of,
    requirements,
)


def rows_of(url: str, view: str) -> list[dict[str, object]]:
    """Everything that a view shows."""
    engine = connect(parse_url(url))
    with engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(text(f"SELECT * FROM {view}")).mappings()]
    engine.dispose()
    return rows


def test_a_worker_comes_back_as_it_registered(store: Store) -> None:
    """Capabilities and live state survive the database."""
    worker = new_worker(store)
    live = LiveState(device_free_bytes={"cpu": 5}, host_free_bytes=6, cache_free_bytes=7, warm_model="tiny")
    renewal = store.leases.heartbeat(worker, live, [], 0)
    assert (renewal.is_registered, renewal.must_drain) == (True, False)
    (view,) = store.fleet.workers()
    assert (view.worker_id, view.node, view.state, view.running) == (worker, "north", "active", 0)
    assert (view.capabilities, view.live, view.warm_model) == (capabilities(), live, "tiny")
    assert 0 <= view.heartbeat_age_ms < 30_000


def test_an_unknown_worker_is_told_to_register(store: Store) -> None:
    """A heartbeat of somebody that the store does not know, or has counted out, says so."""
    assert not store.leases.heartbeat("wkr_nobody", LIVE, [new_lease()], 0).is_registered
    worker = new_worker(store)
    store.leases.retire(worker)
    assert not store.leases.heartbeat(worker, LIVE, [], 0).is_registered
    store.leases.register(worker, capabilities(), LIVE, pid=1)
    assert store.leases.heartbeat(worker, LIVE, [], 0).is_registered


def test_a_silent_worker_is_counted_out(store: Store, store_url: str) -> None:
    """Its models leave the inventory with it; a heartbeat would have kept it."""
    silent, alive = new_worker(store, "silent"), new_worker(store, "alive")
    before, _ = store.fleet.inventory()
    let_time_pass(store_url, 30_001)
    store.leases.heartbeat(alive, LIVE, [], 0)
    store.leases.reap()
    assert [(view.worker_id, view.state) for view in store.fleet.workers(active_only=False)] == [
        (silent, "gone"),
        (alive, "active"),
    ]
    after, models = store.fleet.inventory()
    assert after > before
    assert [model.workers for model in models] == [(alive,)]
    assert store.fleet.forget_gone(60_000) == 0
    assert store.fleet.forget_gone(10_000) == 1


def test_a_large_fleet_is_heard_of_less_often(store: Store, store_url: str) -> None:
    """Heartbeats tell how many workers send them; of 300 each may be silent for 36 s, of few that remain for 30 s."""
    worker = new_worker(store)
    assert store.leases.heartbeat(worker, LIVE, [], 0).fleet_size == 1
    multiply_workers(store_url, 300)
    assert store.leases.heartbeat(worker, LIVE, [], 0).fleet_size == 300
    store.fleet.drain(worker)
    let_time_pass(store_url, 35_000)
    store.leases.reap()
    assert len(store.fleet.workers(active_only=False, gone=False)) == 300
    store.leases.heartbeat(worker, LIVE, [], 0)
    let_time_pass(store_url, 1_001)
    store.leases.reap()
    assert [view.worker_id for view in store.fleet.workers(active_only=False, gone=False)] == [worker]
    assert store.leases.heartbeat(worker, LIVE, [], 0).fleet_size == 1


def test_the_inventory_counts_changes_of_the_models(store: Store) -> None:
    """A new, a changed and a leaving model raise its number; a mere heartbeat or the same registration does not."""
    seen = [store.fleet.inventory()[0]]
    worker = new_worker(store)
    seen.append(store.fleet.inventory()[0])
    store.leases.register(worker, capabilities(), LIVE, pid=1)
    store.leases.heartbeat(worker, LIVE, [], 0)
    assert store.fleet.inventory()[0] == seen[-1]
    unsafe = ModelProfile(name="bad", path=PurePosixPath("bad"), digest="e" * 64, unsafe_because="pickled weights")
    store.leases.register(worker, capabilities(models=(PROFILE, unsafe)), LIVE, pid=1)
    assert store.fleet.inventory()[0] == seen[-1], "a refused model is no model"
    store.leases.register(worker, capabilities(models=()), LIVE, pid=1)
    seen.append(store.fleet.inventory()[0])
    store.leases.retire(worker)
    seen.append(store.fleet.inventory()[0])
    assert seen == sorted(set(seen))
    assert store.fleet.inventory()[1] == ()


def test_the_inventory_names_who_has_a_model(store: Store) -> None:
    """One entry a model, with all its workers, oldest first."""
    north, south = new_worker(store, "north"), new_worker(store, "south")
    (held,) = store.fleet.inventory()[1]
    assert held.profile == PROFILE
    assert set(held.workers) == {north, south}


def test_draining_is_heard_at_the_next_heartbeat(store: Store) -> None:
    """By node or by worker id; whoever registers again goes on draining."""
    worker, other = new_worker(store, "north"), new_worker(store, "south")
    assert store.fleet.drain("north") == 1
    assert store.fleet.drain("north") == 0
    assert store.fleet.drain(other) == 1
    store.leases.register(worker, capabilities(), LIVE, pid=1)
    assert store.leases.heartbeat(worker, LIVE, [], 0).must_drain
    assert store.fleet.workers() == []


def test_the_backlog_tells_what_may_be_claimed_now(store: Store) -> None:
    """Per class; what backs off is queued but not available, what is held is neither."""
    store.jobs.submit(new_job(1, 1, 1, tag="a"))
    store.jobs.submit(new_job(tag="b"))
    store.leases.release(must_claim(store, new_worker(store), "a").lease_id, reason="drain")
    must_claim(store, new_worker(store), "a")
    assert [(item.class_id, item.queued, item.available, item.requirements) for item in store.fleet.backlog()] == [
        (class_of("a"), 2, 2, requirements("a")),
        (class_of("b"), 1, 1, requirements("b")),
    ]


def test_the_backlog_of_a_class_is_counted_as_far_as_workers_can_be_woken(store: Store) -> None:
    """Of very many queued plans the first ones alone are looked at; a class of which none is queued is not there."""
    store.jobs.submit(new_job(*[1] * (MOST_COUNTED + 2), tag="many"))
    store.jobs.submit(new_job(tag="done"))
    must_claim(store, new_worker(store), "done")
    (many,) = store.fleet.backlog()
    assert (many.class_id, many.queued, many.available) == (class_of("many"), MOST_COUNTED, MOST_COUNTED)


def test_a_class_shows_why_it_waits(store: Store) -> None:
    """No capable worker, declined by all that are capable, or nothing; only while queued."""
    job = new_job()
    store.jobs.submit(job)
    assert store.jobs.refresh_conditions(class_of(), []) == 1
    assert store.jobs.refresh_conditions(class_of(), []) == 0
    assert plan_of(store, job).condition == "no-capable-worker"
    north, south = new_worker(store, "north"), new_worker(store, "south")
    assert store.jobs.refresh_conditions(class_of(), ["north", "south"]) == 1
    assert plan_of(store, job).condition is None
    for worker in (north, south):
        store.leases.release(must_claim(store, worker).lease_id, reason="no room", decline_ms=15_000)
        store.jobs.refresh_conditions(class_of(), ["north", "south"])
    assert plan_of(store, job).condition == "declined-everywhere"
    work = must_claim(store, new_worker(store, "east"))
    assert plan_of(store, job).condition is None
    assert not store.jobs.set_condition(work.plan_id, "model-not-present")
    store.leases.start(work.lease_id)
    store.leases.release(work.lease_id, reason="drain")
    assert plan_of(store, job).condition is None
    assert store.jobs.set_condition(work.plan_id, "model-not-present")


def test_plans_of_an_old_inventory_are_found(store: Store) -> None:
    """Until they are planned again, or would be planned the same; what is not queued is left alone."""
    job, held = new_job(), new_job(priority=9)
    store.jobs.submit(job)
    store.jobs.submit(held)
    must_claim(store, new_worker(store))
    (stale,) = store.jobs.stale_plans(7)
    assert isinstance(stale, PlanView)
    assert (stale.job_id, stale.inventory_seq) == (job.job_id, 1)
    assert store.jobs.mark_planned([stale.plan_id, plan_of(store, held).plan_id], 7) == 1
    assert store.jobs.stale_plans(7) == []
    changes = {"runtime_plan": stale.planned, "profile": stale.profile, "requirements": requirements("new")}
    assert store.jobs.replan(stale.plan_id, inventory_seq=8, **changes)  # type: ignore[arg-type]  # a map of keywords
    assert plan_of(store, job).class_id == class_of("new")
    assert [item.class_id for item in store.leases.new_classes(1)] == [class_of("new")]
    assert must_claim(store, new_worker(store), "new").job_id == job.job_id


def test_the_views_show_what_runs(store: Store, store_url: str) -> None:
    """People who monitor with SQL see plans, workers and jobs, in columns that stay."""
    job = new_job(2, 1)
    store.jobs.submit(job)
    worker = new_worker(store)
    work = must_claim(store, worker)
    store.leases.record(work.lease_id, answers(0))
    first, second = sorted(rows_of(store_url, "plan_states"), key=lambda row: str(row["execution_state"]), reverse=True)
    assert (first["execution_state"], first["worker_node"], first["rows_total"], first["rows_done"]) == ("running", "north", 2, 1)
    assert (second["execution_state"], second["planned_passes"], second["backend_id"]) == (
        "queued", "disk-cache,mlp-chunking", "optimized-native",
    )  # fmt: skip
    (fleet,) = rows_of(store_url, "worker_fleet")
    assert (fleet["worker_id"], fleet["state"], fleet["running_plans"], fleet["passes"]) == (worker, "active", 1, "mlp-chunking")
    (progress,) = rows_of(store_url, "job_progress")
    assert (progress["state"], progress["rows_succeeded"], progress["rows_pending"]) == ("running", 1, 2)
    assert progress["completion_tokens"] == 2
    assert isinstance(progress["tokens_per_second"], float) or progress["tokens_per_second"] is not None


def test_models_are_known_by_digest_and_name(store: Store) -> None:
    """The same weights under two names are two entries, so that either name is found."""
    twin = ModelProfile(name="twin", path=PurePosixPath("twin"), digest=DIGEST)
    new_worker(store, models=(PROFILE, twin))
    assert [held.profile.name for held in store.fleet.inventory()[1]] == ["tiny", "twin"]


def test_a_change_by_somebody_else_is_noticed(store: Store, store_url: str) -> None:
    """On SQLite the token differs after every commit, which idle workers poll for; PostgreSQL needs no such thing."""
    before = store.change_token()
    assert store.change_token() == before
    store.jobs.submit(new_job())
    assert (store.change_token() != before) == store_url.startswith("sqlite")


def test_workers_that_are_gone_can_be_left_out(store: Store) -> None:
    """In the query, so that old ones cost nothing; those that drain are still shown."""
    left, draining = new_worker(store, "left"), new_worker(store, "draining")
    store.leases.retire(left)
    store.fleet.drain("draining")
    assert [view.worker_id for view in store.fleet.workers(active_only=False, gone=False)] == [draining]
    assert len(store.fleet.workers(active_only=False)) == 2


def test_a_replan_keeps_how_an_attempt_ran(store: Store, store_url: str) -> None:
    """Rows that only failed show it as well; before the first row the views show the newest intent."""
    for job, is_run in ((new_job(), True), (new_job(), False)):
        store.jobs.submit(job)
        if is_run:
            lease = must_claim(store, new_worker(store)).lease_id
            error = RowError(code="x", message="y")
            store.leases.record(lease, [RowResult(row=0, error=error)], REPORT)
            store.leases.release(lease, reason="drain")
        plan = plan_of(store, job)
        seq = plan.inventory_seq + 1
        changes = {"runtime_plan": FALLBACK, "profile": plan.profile, "requirements": requirements()}
        assert store.jobs.replan(plan.plan_id, inventory_seq=seq, **changes)  # type: ignore[arg-type]  # a map of keywords
        (shown,) = [row for row in rows_of(store_url, "plan_states") if row["plan_id"] == plan.plan_id]
        assert shown["specialization_state"] == ("applied" if is_run else "fallback")


def test_who_explains_why_plans_wait_waits_for_nobody(store: Store, store_url: str) -> None:
    """A plan that somebody else has locked is left to the next turn, so that no order of locks can be violated."""
    job = new_job(1, 1)
    store.jobs.submit(job)
    if store_url.startswith("sqlite"):
        return  # there is one writer at a time
    plan_ids = [plan.plan_id for plan in plans_of(store, job)]
    engine = connect(parse_url(store_url))
    with engine.begin() as connection:
        connection.execute(text("SELECT 1 FROM runtime_plans WHERE id = :plan FOR UPDATE"), {"plan": plan_ids[0]})
        assert store.jobs.refresh_conditions(class_of(), []) == 1
        assert store.jobs.mark_planned(plan_ids, 7) == 1
    engine.dispose()
    assert store.jobs.refresh_conditions(class_of(), []) == 1
    assert store.jobs.mark_planned(plan_ids, 7) == 1
