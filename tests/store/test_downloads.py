"""What is remembered of downloads: who asked, who has it, how far it is, and who is told?"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from ollm_service.core.downloading import DownloadState, HubModel
from ollm_service.core.errors import NotFound
from ollm_service.core.retry import MOST_FAILURES, MOST_LOSSES, Failure
from ollm_service.store.database import Store
from ollm_service.store.downloads import DownloadView
from tests.store.ageing import let_time_pass
from tests.store.conftest import LEASE_MS
from tests.store.samples import LIVE, PLAN, TENANT, capabilities, new_job, new_lease, new_worker, plan_of, requirements

MODEL = HubModel(repo_id="org/name", revision=None, folder="org--name")
BROKEN = Failure(code="hub_unreachable", message="the hub went away")
GATED = Failure(code="gated", message="set HF_TOKEN on the worker", is_permanent=True)


def anything(_: str) -> bool:
    """An operator who allows every repository."""
    return True


def ask(store: Store, number: int = 1, *, nodes: Collection[str] | None = None) -> DownloadView:
    """Ask for the model."""
    return store.downloads.request(MODEL, f"dl_{number}", nodes=nodes)[0]


def take(store: Store, worker_id: str, node: str = "north") -> str:
    """Claim it for a worker; the lease."""
    lease = new_lease()
    assert store.downloads.claim(worker_id, node, lease, anything) is not None, "nothing to claim"
    return lease


def test_a_model_is_asked_for_once_while_it_is_under_way(store: Store) -> None:
    """A second request returns the first; after its end there is a new one. One for a certain node is another."""
    first, is_new = store.downloads.request(MODEL, "dl_1")
    assert (first.download_id, first.state, first.bytes_total, is_new) == ("dl_1", DownloadState.QUEUED, None, True)
    assert store.downloads.request(MODEL, "dl_2") == (first, False)
    there, is_new = store.downloads.request(MODEL, "dl_3", target="south")
    assert (there.nodes, there.target, is_new) == (("south",), "south", True)
    worker = new_worker(store)
    assert store.downloads.finish(take(store, worker))
    assert store.downloads.request(MODEL, "dl_4")[1]
    assert {download.download_id for download in store.downloads.list(reference="org/name")} == {"dl_1", "dl_3", "dl_4"}
    with pytest.raises(NotFound, match="no download dl_9"):
        store.downloads.get("dl_9")


def test_many_who_ask_and_take_at_once_get_one(store: Store) -> None:
    """Eight coordinators ask for the same, and eight workers reach for it: one download, one lease."""
    worker = new_worker(store)
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda number: store.downloads.request(MODEL, f"dl_{number}"), range(8)))
        assert sum(is_new for _, is_new in asked) == 1
        assert len({download.download_id for download, _ in asked}) == 1
        taken = list(pool.map(lambda _: store.downloads.claim(worker, "north", new_lease(), anything), range(8)))
    assert sum(download is not None for download in taken) == 1


def test_only_a_worker_that_may_gets_a_download(store: Store) -> None:
    """By its operator's word, by its node, and while it is active; more nodes may be added while it waits."""
    worker = new_worker(store, "north")
    ask(store, nodes=["south"])
    assert store.downloads.claim(worker, "north", new_lease(), anything) is None
    assert ask(store, 2, nodes=["north"]).nodes == ("north", "south")
    assert store.downloads.claim(worker, "north", new_lease(), lambda repo: repo != "org/name") is None
    assert store.downloads.claim("wkr_unknown", "north", new_lease(), anything) is None
    claimed = store.downloads.claim(worker, "north", new_lease(), anything)
    assert claimed is not None
    assert (claimed.state, claimed.worker_id, claimed.node, claimed.attempt) == (DownloadState.RUNNING, worker, "north", 1)
    assert store.downloads.claim(worker, "north", new_lease(), anything) is None


def test_the_lease_guards_every_write(store: Store, store_url: str) -> None:
    """A worker that was silent for too long writes nothing; the next one goes on, and bytes make losses forgotten."""
    worker = new_worker(store)
    ask(store)
    old = take(store, worker)
    assert store.downloads.progress(old, 10, bytes_total=100, commit_id="abc")
    let_time_pass(store_url, LEASE_MS + 1_000)
    assert store.downloads.reap() == 1
    assert store.downloads.get("dl_1").reason == "north fell silent"
    assert not store.downloads.progress(old, 20)
    assert not store.downloads.finish(old)
    assert store.downloads.fail(old, BROKEN) is None
    assert not store.downloads.release(old, reason="x")
    lease = take(store, worker)
    assert store.downloads.progress(lease, 30)
    found = store.downloads.get("dl_1")
    assert (found.attempt, found.bytes_done, found.bytes_total, found.commit_id, found.reason) == (2, 30, 100, "abc", None)
    assert store.downloads.reap() == 0
    assert store.downloads.finish(lease)
    assert (store.downloads.get("dl_1").state, store.downloads.get("dl_1").bytes_done) == (DownloadState.DONE, 100)


def test_what_is_lost_again_and_again_without_a_byte_fails(store: Store, store_url: str) -> None:
    """After as many losses as a plan; the last worker is named."""
    worker = new_worker(store)
    ask(store)
    for _ in range(MOST_LOSSES):
        take(store, worker)
        let_time_pass(store_url, LEASE_MS + 1_000)
        store.leases.register(worker, capabilities(), LIVE, pid=1)
        assert store.downloads.reap() == 1
    found = store.downloads.get("dl_1")
    assert found.state is DownloadState.FAILED
    assert found.reason is not None
    assert "the last was north" in found.reason


def test_a_passing_failure_is_tried_again_and_a_permanent_one_is_not(store: Store) -> None:
    """Queued with the reason until it has failed too often without a byte; at once where trying again cannot help."""
    worker = new_worker(store)
    ask(store)
    for _ in range(MOST_FAILURES - 1):
        assert store.downloads.fail(take(store, worker), BROKEN) is DownloadState.QUEUED
        assert store.downloads.get("dl_1").reason == "the hub went away"
    lease = take(store, worker)
    assert store.downloads.progress(lease, 5)  # it came further: the failures before do not count
    assert store.downloads.fail(lease, BROKEN) is DownloadState.QUEUED
    for _ in range(MOST_FAILURES - 2):
        assert store.downloads.fail(take(store, worker), BROKEN) is DownloadState.QUEUED
    assert store.downloads.fail(take(store, worker), BROKEN) is DownloadState.FAILED
    ask(store, 2)
    assert store.downloads.fail(take(store, worker), GATED, is_everywhere=True) is DownloadState.FAILED
    found = store.downloads.get("dl_2")
    assert (found.reason, found.is_everywhere) == ("set HF_TOKEN on the worker", True)


def test_plans_that_wait_for_the_model_are_told(store: Store) -> None:
    """Their histories get the beginning and the end with the worker's name; the plans of other models nothing."""
    needs = replace(requirements(), model_digest=None, download="org/name")
    job = new_job()
    waiting = replace(job, plans=[replace(job.plans[0], requirements=needs)], model="org/name")
    store.jobs.submit(waiting)
    other = new_job()
    store.jobs.submit(other)
    (wanted,) = store.downloads.wanted([plan_of(store, waiting).class_id])
    assert (wanted.model, store.downloads.wanted([])) == ("org/name", [])
    worker = new_worker(store)
    ask(store)
    store.downloads.fail(take(store, worker), GATED)
    ask(store, 2)
    lease = take(store, worker)
    assert store.downloads.release(lease, reason="it leaves")
    store.downloads.finish(take(store, worker))
    history = store.jobs.plan(plan_of(store, waiting).plan_id, TENANT).events
    assert [event.kind for event in history] == [
        *("submit", "download-started", "download-failed", "download-started", "download-started", "download-done"),
    ]
    assert (history[2].reason, history[2].node) == ("set HF_TOKEN on the worker", "north")
    assert {event.to_state for event in history} == {"queued"}
    assert [event.kind for event in store.jobs.plan(plan_of(store, other).plan_id, TENANT).events] == ["submit"]
    assert plan_of(store, other).planned == PLAN


def test_ended_downloads_are_forgotten_after_a_while(store: Store, store_url: str) -> None:
    """Those that are under way are not."""
    worker = new_worker(store)
    ask(store)
    store.downloads.finish(take(store, worker))
    ask(store, 2)
    assert store.downloads.forget(1_000) == 0
    let_time_pass(store_url, 2_000)
    assert store.downloads.forget(1_000) == 1
    assert [download.download_id for download in store.downloads.list()] == ["dl_2"]
