"""Do jobs and plans have their pinned shapes over HTTP?"""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from ollm_service.coordinator.service import Service
from ollm_service.coordinator.submission import ROWS_PER_PLAN, submit
from ollm_service.core.leasing import RowError
from ollm_service.core.plan import ResolvedModel, RuntimePlan
from ollm_service.core.wire import from_json
from tests.coordinator.services import ROWS, answer, claim_one, submission
from tests.store.samples import new_worker
from tests.store.spoiling import spoil

JOB: dict[str, Any] = {"model": "tiny", "rows": ROWS}


def test_a_submission_is_answered_with_the_job_and_its_plans(http: TestClient, worker_id: str) -> None:
    """201 with everything that is pinned, before anything has run; GET gives the same."""
    answered = http.post("/v1/jobs", json={**JOB, "generation": {"stop": ["\n"], "max_new_tokens": 5}, "priority": 3})
    job = answered.json()
    assert (answered.status_code, answered.headers["location"]) == (201, f"/v1/jobs/{job['id']}")
    assert (job["state"], job["row_count"], job["plans_total"], job["priority"]) == ("queued", 2, 1, 3)
    assert job["counts"] == {"succeeded": 0, "failed": 0, "pending": 2}
    assert job["generation"] == {"stop": ["\n"], "max_new_tokens": 5}
    (plan,) = job["plans"]
    assert {"id", "state", "condition", "class_id", "row_count", "runtime_plan", "requirements", "attempt", "worker"} <= set(plan)
    assert (plan["state"], plan["condition"], plan["row_count"], plan["attempt"], plan["worker"]) == ("queued", None, 2, 0, None)
    assert plan["runtime_plan"]["specialization_state"] == "planned"
    assert http.get(f"/v1/jobs/{job['id']}").json() == job


def test_a_plan_on_the_wire_can_be_read_back(http: TestClient, worker_id: str) -> None:
    """`runtime_plan` and `resolved_model` together rebuild the RuntimePlan."""
    (plan,) = http.post("/v1/jobs", json=JOB).json()["plans"]
    resolved = from_json(ResolvedModel, plan["resolved_model"])
    assert RuntimePlan.from_dict(plan["runtime_plan"], resolved_model=resolved).as_dict() == plan["runtime_plan"]


def test_the_same_key_answers_with_the_same_job(http: TestClient, worker_id: str) -> None:
    """However the same body is written; another body is 409, and clients are told not to try again."""
    body = {**JOB, "idempotency_key": "k"}
    first = http.post("/v1/jobs", json=body)
    again = http.post("/v1/jobs", content=json.dumps(dict(reversed(body.items())), indent=3))
    assert (again.status_code, again.json(), again.headers["idempotent-replayed"]) == (201, first.json(), "true")
    other = http.post("/v1/jobs", json={**body, "rows": ROWS[:1]})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert other.headers["x-should-retry"] == "false"


def test_a_large_job_shows_a_hundred_plans_and_pages_through_all(http: TestClient, service: Service, worker_id: str) -> None:
    """The job shows as many of its first plans as asked for, up to 100; the list has each of them once, in order."""
    total = 101
    job_id = submit(service, submission([{"prompt": "x"}] * (ROWS_PER_PLAN * (total - 1) + 1))).job.job_id
    job = http.get(f"/v1/jobs/{job_id}").json()
    assert (job["plans_total"], len(job["plans"])) == (total, 100)
    assert len(http.get(f"/v1/jobs/{job_id}", params={"plans": 3}).json()["plans"]) == 3
    first = http.get(f"/v1/jobs/{job_id}/plans", params={"limit": 60}).json()
    second = http.get(f"/v1/jobs/{job_id}/plans", params={"limit": 60, "after": first["next"]}).json()
    assert (first["has_more"], second["has_more"], second["next"]) == (True, False, None)
    assert [plan["number"] for plan in first["data"] + second["data"]] == list(range(total))


def test_jobs_are_listed_newest_first(http: TestClient, worker_id: str) -> None:
    """The list pages through all jobs without their plans."""
    made = [http.post("/v1/jobs", json=JOB).json()["id"] for _ in range(3)]
    first = http.get("/v1/jobs", params={"limit": 2}).json()
    second = http.get("/v1/jobs", params={"limit": 2, "after": first["next"]}).json()
    assert [job["id"] for job in first["data"] + second["data"]] == made[::-1]
    assert first["data"][0]["plans"] == []


def test_plans_of_all_jobs_are_listed(http: TestClient, service: Service, worker_id: str) -> None:
    """In the shape that jobs show, newest job first, in pages; by job, and by the state that they are in."""
    old, new = (http.post("/v1/jobs", json=JOB).json() for _ in range(2))
    first = http.get("/v1/plans", params={"limit": 1}).json()
    second = http.get("/v1/plans", params={"limit": 1, "after": first["next"]}).json()
    assert (first["has_more"], second["has_more"], second["next"]) == (True, False, None)
    assert first["data"] + second["data"] == new["plans"] + old["plans"]
    claimed = claim_one(service, worker_id).plan_id
    assert claimed == old["plans"][0]["id"]
    for params, job in (({"state": "leased"}, old), ({"state": "queued"}, new), ({"job": new["id"]}, new)):
        found = http.get("/v1/plans", params=params).json()["data"]
        assert [plan["id"] for plan in found] == [job["plans"][0]["id"]]


@pytest.mark.parametrize(
    ("params", "status", "param"),
    [
        ({"state": "asleep"}, 400, "state"),
        ({"job": "job_no"}, 404, None),
        ({"after": "plan_no"}, 404, "after"),
        ({"limit": "0"}, 400, "limit"),
    ],
)
def test_a_wrong_question_about_plans_is_refused(
    http: TestClient, params: dict[str, str], status: int, param: str | None
) -> None:
    """With the parameter that is wrong."""
    refused = http.get("/v1/plans", params=params)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)


def test_a_plan_tells_its_history(http: TestClient, service: Service, worker_id: str) -> None:
    """Events with from and to, attempts with placement and measurements, and the plan as planned beside the one that ran."""
    job = http.post("/v1/jobs", json=JOB).json()
    answer(service, claim_one(service, worker_id))
    plan = http.get(f"/v1/plans/{job['plans'][0]['id']}").json()
    assert (plan["state"], plan["worker"], plan["node"], plan["attempt"]) == ("succeeded", worker_id, "attic", 1)
    steps = [(event["from"], event["to"]) for event in plan["events"] if event["from"] != event["to"]]
    assert steps[0] == (None, "queued")
    assert steps[-1][1] == "succeeded"
    assert all({"at", "kind", "from", "to", "worker", "reason"} <= set(event) for event in plan["events"])
    (attempt,) = plan["attempts"]
    assert {"number", "worker", "outcome", "runtime_plan", "placement", "estimate", "measured"} <= set(attempt)
    assert (attempt["number"], attempt["worker"], attempt["outcome"]) == (1, worker_id, "succeeded")
    assert attempt["measured"] == {"load_seconds": 1.5}
    assert plan["planned"]["specialization_state"] == "planned"
    assert plan["runtime_plan"]["specialization_state"] == "applied"
    assert plan["workers"] == []


def test_a_plan_that_cannot_be_read_hides_nothing_else(http: TestClient, service: Service, url: str, worker_id: str) -> None:
    """Its job and the lists are shown without it; asked for by its id it is an error in words."""
    spoilt, sound = (http.post("/v1/jobs", json=JOB).json() for _ in range(2))
    plan_id = spoilt["plans"][0]["id"]
    spoil(url, "runtime_plans", "planned", plan_id)
    job = http.get(f"/v1/jobs/{spoilt['id']}").json()
    assert (job["state"], job["plans_total"], job["plans"]) == ("queued", 1, [])
    assert http.get("/v1/plans").json()["data"] == sound["plans"]
    refused = http.get(f"/v1/plans/{plan_id}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "service_error")
    assert "cannot be read" in refused.json()["error"]["message"]


def test_a_waiting_plan_explains_what_each_worker_lacks(http: TestClient, service: Service, worker_id: str) -> None:
    """A queued plan shows every worker's verdict, with all reasons."""
    other = new_worker(service.store, "cellar", labels={"zone": "cellar"})
    job = http.post("/v1/jobs", json={**JOB, "where": 'zone == "cellar"'}).json()
    verdicts = http.get(f"/v1/plans/{job['plans'][0]['id']}").json()["workers"]
    assert {verdict["worker_id"]: verdict["eligible"] for verdict in verdicts} == {worker_id: False, other: True}
    assert [verdict["reasons"] for verdict in verdicts if verdict["worker_id"] == worker_id] == [
        ['labels: `zone == "cellar"` does not hold here']
    ]


def test_what_stands_in_the_way_is_explained(http: TestClient, service: Service, worker_id: str) -> None:
    """Of a job and of one plan: rows, demands with their commands, what each worker says, and who is offline."""
    service.store.leases.retire(new_worker(service.store, "cellar"))
    job = http.post("/v1/jobs", json={**JOB, "where": 'zone == "moon"'}).json()
    explained = http.get(f"/v1/jobs/{job['id']}/explain").json()
    assert {name: explained[name] for name in ("row_count", "answered", "running", "waiting", "stuck")} == {
        "row_count": 2,
        "answered": 0,
        "running": 0,
        "waiting": 2,
        "stuck": 2,
    }
    (group,) = explained["groups"]
    plan = http.get(f"/v1/plans/{job['plans'][0]['id']}").json()
    for found in (group, plan):
        (way,) = found["conflicts"]["ways"]
        assert (way["give_up"], way["node"]) == ([{"kind": "labels", "words": 'zone == "moon"'}], "attic")
        assert way["command"] == f"ollm-service amend {job['id']} --where any"
        assert way["placement"]["tier"] == "all on device"
        assert [(worker["node"], worker["state"], worker["eligible"]) for worker in found["workers"]] == [
            ("attic", "active", False)
        ]
        assert [(worker["node"], worker["state"]) for worker in found["offline"]] == [("cellar", "gone")]
    assert (group["plan_ids"], group["rows_left"], group["condition"]) == ([plan["id"]], 2, "no-capable-worker")
    assert http.get("/v1/jobs/job_none/explain").status_code == 404


def test_cancelling_ends_what_waits_and_twice_is_harmless(http: TestClient, worker_id: str) -> None:
    """The answer is the job as it is then; its rows carry the error."""
    job_id = http.post("/v1/jobs", json=JOB).json()["id"]
    for _ in range(2):
        job = http.post(f"/v1/jobs/{job_id}/cancel").json()
        assert (job["state"], job["counts"]) == ("cancelled", {"succeeded": 0, "failed": 2, "pending": 0})
    assert job["finished_at"].endswith("Z")


def test_amending_changes_what_waits_and_says_how_much(http: TestClient, service: Service, worker_id: str) -> None:
    """The answer is the job as it is then, and what was changed; a repetition is harmless; an empty or wrong body is refused."""
    job_id = http.post("/v1/jobs", json={**JOB, "where": 'zone == "moon"'}).json()["id"]
    for _ in range(2):
        amended = http.post(f"/v1/jobs/{job_id}/amend", json={"where": "any", "runtime": {"kv_cache_strategy": "resident"}})
        job = amended.json()
        assert (amended.status_code, job["plans_amended"], job["plans_kept"], job["rows_skipped"]) == (200, 1, 0, 0)
        assert (job["where"], job["runtime"], job["plans"][0]["condition"]) == (None, {"kv_cache_strategy": "resident"}, None)
    claim_one(service, worker_id)
    kept = http.post(f"/v1/jobs/{job_id}/amend", json={"runtime": {"kv_cache_strategy": None}, "skip_rows": [0]}).json()
    assert (kept["plans_amended"], kept["plans_kept"], kept["rows_skipped"]) == (0, 1, 0)
    for body, status in (({}, 400), ({"skip_rows": [-1]}, 400), ({"model": "x"}, 400), ({"runtime": {"device": "gpu"}}, 400)):
        assert http.post(f"/v1/jobs/{job_id}/amend", json=body).status_code == status
    assert http.post("/v1/jobs/job_none/amend", json={"where": "any"}).status_code == 404


def test_retry_answers_with_a_new_linked_job(http: TestClient, service: Service, worker_id: str) -> None:
    """With or without a body; a job that still runs is a conflict."""
    job_id = http.post("/v1/jobs", json=JOB).json()["id"]
    early = http.post(f"/v1/jobs/{job_id}/retry")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "conflict")
    error = RowError(code="runner_crashed", message="The runner crashed twice.")
    answer(service, claim_one(service, worker_id), errors={1: error})
    bare = http.post(f"/v1/jobs/{job_id}/retry")
    assert (bare.status_code, bare.json()["row_count"], bare.json()["retry_of"]) == (201, 1, job_id)
    keyed = [http.post(f"/v1/jobs/{job_id}/retry", json={"idempotency_key": "r"}).json()["id"] for _ in range(2)]
    assert keyed[0] == keyed[1] != bare.json()["id"]


def test_a_preview_shows_the_plan_and_stores_nothing(http: TestClient, worker_id: str) -> None:
    """Plan, requirements, class, each worker's verdict, and which rows would fail."""
    shown = http.post("/v1/plans/preview", json={"model": "tiny", "rows": [*ROWS, 7]}).json()
    assert (shown["executable"], shown["condition"], shown["rows"]["row_count"]) == (True, None, 3)
    assert [(row["row"], row["code"]) for row in shown["rows"]["invalid"]] == [(2, "invalid_row")]
    assert shown["workers"] == [{"worker_id": worker_id, "node": "attic", "eligible": True, "reasons": []}]
    assert http.get("/v1/jobs").json()["data"] == []
    stored = http.post("/v1/jobs", json=JOB).json()["plans"][0]
    assert (stored["class_id"], stored["requirements"]) == (shown["class_id"], shown["requirements"])


@pytest.mark.parametrize("path", ["/v1/jobs/job_x", "/v1/jobs/job_x/plans", "/v1/jobs/job_x/results", "/v1/plans/plan_x"])
def test_what_is_not_there_is_a_404_in_the_envelope(http: TestClient, path: str) -> None:
    """Not FastAPI's `detail`."""
    missing = http.get(path)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
