"""Which absent models does a coordinator have fetched by itself, by whom, and when not again?"""

from typing import Any

import pytest

from ollm_service.coordinator.models import want_downloads
from ollm_service.coordinator.service import Service
from ollm_service.coordinator.submission import submit
from ollm_service.coordinator.upkeep import sweep
from ollm_service.core.downloading import DownloadState
from ollm_service.core.retry import Failure
from ollm_service.store.downloads import DownloadView
from tests.coordinator.services import sent_hints, submission
from tests.store.samples import new_lease
from tests.store.samples import new_worker as any_worker
from tests.waiting import wait_for

GATED = Failure(code="gated", message="set HF_TOKEN on the worker", is_permanent=True)


def new_worker(service: Service, node: str, **changes: Any) -> str:
    """A worker with both backends, as nothing is known of a model before it is there."""
    backends = {"optimized-native": None, "transformers-generic": None}
    return any_worker(service.store, node, **({"backends": backends, "may_download": True} | changes))


def look(service: Service) -> int:
    """One look of a coordinator; how many downloads it newly asked for."""
    return want_downloads(service, service.fleet.fresh(), service.store.fleet.backlog())


def asked(service: Service) -> list[DownloadView]:
    """Every download, the oldest first."""
    return list(reversed(service.store.downloads.list()))


def claim(service: Service, worker_id: str, node: str) -> str:
    """Take what waits; the lease."""
    lease = new_lease()
    assert service.store.downloads.claim(worker_id, node, lease, lambda _: True) is not None, "nothing to claim"
    return lease


def test_one_worker_that_may_is_enough(service: Service) -> None:
    """Nothing is asked for until somebody may; then once, for all jobs, and only of those that could run it, too."""
    submit(service, submission(model="org/name"))
    submit(service, submission(model="hf:org/name"))
    new_worker(service, "attic", may_download=False)
    assert look(service) == 0
    new_worker(service, "cellar", downloadable=("other/*",))
    assert look(service) == 0
    new_worker(service, "shed", labels={"zone": "home"})
    new_worker(service, "yard")
    assert (look(service), look(service)) == (1, 0)
    (download,) = asked(service)
    assert (download.reference, download.folder, download.nodes) == ("org/name", "org--name", ("shed", "yard"))
    submit(service, submission(model="org/other@v1", where='zone == "home"'))
    assert look(service) == 1
    assert (asked(service)[1].reference, asked(service)[1].nodes) == ("org/other@v1", ("shed",))


def test_a_plan_whose_model_is_fetched_still_waits_for_it(service: Service) -> None:
    """Its condition stays `model-not-present`: who may fetch a model cannot run it before it is there, so nobody is hinted at."""
    new_worker(service, "attic")
    job = submit(service, submission(model="org/name")).job
    for _ in range(2):
        (plan,) = service.store.jobs.plans(job.job_id, "default")
        assert plan.condition == "model-not-present"
        sweep(service)
    assert [download.state for download in asked(service)] == [DownloadState.QUEUED]
    assert sent_hints(service) == []


@pytest.mark.parametrize("is_everywhere", [True, False])
def test_what_failed_is_tried_elsewhere_unless_it_would_fail_there_too(service: Service, is_everywhere: bool) -> None:
    """Not again on the same worker by itself; a new job is reason enough to try."""
    attic = new_worker(service, "attic")
    submit(service, submission(model="org/name"))
    assert look(service) == 1
    service.store.downloads.fail(claim(service, attic, "attic"), GATED, is_everywhere=is_everywhere)
    assert look(service) == 0
    new_worker(service, "cellar")
    assert look(service) == (0 if is_everywhere else 1)
    if is_everywhere:
        _until_later(service)
        submit(service, submission(model="org/name"))
        assert look(service) == 1
    else:
        assert asked(service)[-1].nodes == ("cellar",)


def test_a_worker_that_was_started_again_may_try_again(service: Service) -> None:
    """With a token this time, perhaps."""
    attic = new_worker(service, "attic")
    submit(service, submission(model="org/name"))
    look(service)
    service.store.downloads.fail(claim(service, attic, "attic"), GATED)
    service.store.leases.retire(attic)
    _until_later(service)
    new_worker(service, "attic")
    assert look(service) == 1


def test_what_has_just_arrived_is_not_fetched_by_another(service: Service) -> None:
    """Between the end of a download and the worker's word of its new model nobody starts anew."""
    attic = new_worker(service, "attic")
    new_worker(service, "cellar")
    submit(service, submission(model="org/name"))
    look(service)
    service.store.downloads.finish(claim(service, attic, "attic"))
    assert look(service) == 0


def _until_later(service: Service) -> None:
    """Return when the database's clock shows another millisecond."""
    before = service.store.now_ms()
    wait_for(lambda: service.store.now_ms() > before, timeout=5, what="the clock to go on")
