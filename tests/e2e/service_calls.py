"""What does a user say to the service over HTTP, and what comes back? Plain requests in the published shapes.

Not the project's own client on purpose: what the tests assert is what goes over the wire. Submissions carry an idempotency
key and are sent again after a lost connection, so that an acknowledged job is one whose 201 or 200 was read.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from tests.waiting import wait_for

FINAL_STATES = frozenset({"succeeded", "failed", "cancelled", "expired"})


class ServiceCalls:
    """One user of one coordinator."""

    def __init__(self, base_url: str) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=15, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> httpx.Response:
        """The raw answer to GET."""
        return self._http.get(path, params=params)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        """The raw answer to POST."""
        return self._http.post(path, json=body)

    def submit(self, model: str, rows: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
        """The accepted job. Raises AssertionError when it is refused, httpx.TransportError when nobody answers."""
        body = {"model": model, "rows": list(rows), "idempotency_key": uuid.uuid4().hex, **fields}
        answer = self.post("/v1/jobs", body)
        assert answer.status_code in (200, 201), f"submission refused: {answer.status_code} {answer.text}"
        return _object(answer)

    def submit_through_outages(
        self, model: str, rows: Sequence[Mapping[str, Any]], *, timeout: float, **fields: Any
    ) -> dict[str, Any]:
        """The accepted job, asked for again with the same key until the service answers."""
        body = {"model": model, "rows": list(rows), "idempotency_key": uuid.uuid4().hex, **fields}
        return wait_for(
            lambda: self._try(lambda: self.post("/v1/jobs", body)), timeout=timeout, what="a submission to be accepted"
        )

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as it is now."""
        return _checked(self.get(f"/v1/jobs/{job_id}"))

    def cancel(self, job_id: str) -> dict[str, Any]:
        """The job after asking for its end."""
        return _checked(self.post(f"/v1/jobs/{job_id}/cancel"))

    def cancel_through_outages(self, job_id: str, *, timeout: float) -> dict[str, Any]:
        """The same, asked until the service answers."""
        return wait_for(lambda: self._try(lambda: self.post(f"/v1/jobs/{job_id}/cancel")), timeout=timeout, what="a cancel")

    def plans(self, job_id: str) -> list[dict[str, Any]]:
        """Every plan of the job, through all pages."""
        found: list[dict[str, Any]] = []
        after: dict[str, Any] = {}
        while True:
            page = _checked(self.get(f"/v1/jobs/{job_id}/plans", limit=100, **after))
            found += page["data"]
            if not page["has_more"]:
                return found
            after = {"after": page["next"]}

    def plan(self, plan_id: str) -> dict[str, Any]:
        """One plan with its events and attempts."""
        return _checked(self.get(f"/v1/plans/{plan_id}"))

    def workers(self) -> list[dict[str, Any]]:
        """The active workers; none while the coordinator is away."""
        try:
            answer = self.get("/v1/workers")
        except httpx.TransportError:
            return []
        return list(_object(answer)["data"]) if answer.status_code == 200 else []

    def results(self, job_id: str, *, cursor: int = 0) -> list[dict[str, Any]]:
        """Every result after the cursor that is there now."""
        answer = self.get(f"/v1/jobs/{job_id}/results", cursor=cursor)
        assert answer.status_code == 200, answer.text
        return [json.loads(line) for line in answer.text.splitlines() if line]

    def wait_final(self, job_id: str, *, timeout: float) -> dict[str, Any]:
        """The job once it has ended, asked through outages of the service."""
        return wait_for(
            lambda: self._if(job_id, lambda job: job["state"] in FINAL_STATES), timeout=timeout, what=f"{job_id} to end"
        )

    def wait_done_rows(self, job_id: str, least: int, *, timeout: float) -> dict[str, Any]:
        """The job once at least so many of its rows are answered, well or not."""
        return wait_for(
            lambda: self._if(job_id, lambda job: job["row_count"] - job["counts"]["pending"] >= least),
            timeout=timeout,
            what=f"{least} rows of {job_id}",
        )

    def wait_plan(self, plan_id: str, states: set[str], *, timeout: float) -> dict[str, Any]:
        """The plan once it is in one of these states."""
        return wait_for(
            lambda: next((plan for plan in [self.plan(plan_id)] if plan["state"] in states), None),
            timeout=timeout,
            what=f"{plan_id} to be {' or '.join(sorted(states))}",
        )

    def _if(self, job_id: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        job = self._try(lambda: self.get(f"/v1/jobs/{job_id}"))
        return job if job is not None and holds(job) else None

    @staticmethod
    def _try(ask: Callable[[], httpx.Response]) -> dict[str, Any] | None:
        """The answer, or None while the service or its database is away."""
        try:
            answer = ask()
        except httpx.TransportError:
            return None
        if answer.status_code == 503:
            return None
        return _checked(answer)


def _checked(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code in (200, 201), f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}"
    return _object(answer)


def _object(answer: httpx.Response) -> dict[str, Any]:
    value = answer.json()
    assert isinstance(value, dict), value
    return value
