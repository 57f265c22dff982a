"""What can a user ask of the service? Submit, look, preview and drain: one Client for one service."""

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self
from urllib.parse import quote

from ollm_service.client.jobs import Job
from ollm_service.client.models import Download, Pull
from ollm_service.client.rows import rows_to_send
from ollm_service.client.transport import Transport
from ollm_service.client.views import JobStatus, Model, Plan, Preview, Worker
from ollm_service.configuration import read_options
from ollm_service.core.errors import NotFound
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.options import GenerationConfig, RuntimeConfig

LOCAL_SERVICE = "http://127.0.0.1:8000"
PAGE_LENGTH = 100


class Client:
    """A user of one service, `OLLM_BASE_URL` or the one on this machine. Thread-safe; close it or use it in a `with`.

    Every method may raise an OllmError: a RequestError for what the caller can mend, a ServiceError otherwise, each with its
    code, param and remedy. Requests are repeated after a lost connection, and no repetition does anything twice. Options that
    a call leaves open are those of this machine's environment and `ollm.toml` as they were when the client was made, which
    raises MisconfiguredService where they are wrong.
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None) -> None:
        address = base_url or os.environ.get("OLLM_BASE_URL") or LOCAL_SERVICE
        self._options = read_options(os.environ)
        self._transport = Transport(address, api_key or os.environ.get("OLLM_API_KEY"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._transport.close()

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._transport.base_url

    def submit(
        self,
        model: str,
        rows: Iterable[Any],
        runtime: RuntimeConfig | Mapping[str, Any] | None = None,
        generation: GenerationConfig | Mapping[str, Any] | None = None,
        *,
        priority: int | None = None,
        where: str | None = None,
        deadline_seconds: float | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Store a job and return it with its plans; nothing has run yet.

        A row is a text (a prompt), a list of messages, or a mapping `{custom_id?, prompt | messages, generation?}`. With an
        `idempotency_key`, submitting the same again returns the first job; one is made where none is given, so that this
        call's own repetitions are safe. A row that is wrong by itself ends with an error and the others go on.
        """
        runtime, generation = self._options.to_send(_options(runtime), _options(generation))
        body: dict[str, Any] = {
            "model": model,
            "rows": rows_to_send(rows),
            "runtime": runtime,
            "generation": generation,
            "priority": priority,
            "where": where,
            "deadline_seconds": deadline_seconds,
            "idempotency_key": idempotency_key,
        }
        return self._submit(body)

    def submit_previewed(
        self,
        preview_id: str,
        rows: Iterable[Any],
        *,
        priority: int | None = None,
        deadline_seconds: float | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """The same, of exactly what a preview of these rows has shown: its model, options and plan.

        Raises PlanChanged where something else would run now, saying what, and NotFound for an unknown preview.
        """
        body = {"plan": preview_id, "rows": rows_to_send(rows), "priority": priority, "deadline_seconds": deadline_seconds}
        return self._submit(body | {"idempotency_key": idempotency_key})

    def preview(
        self,
        model: str,
        runtime: RuntimeConfig | Mapping[str, Any] | None = None,
        generation: GenerationConfig | Mapping[str, Any] | None = None,
        *,
        where: str | None = None,
        rows: Iterable[Any] | None = None,
        if_workers: Iterable[str | Mapping[str, Any]] = (),
    ) -> Preview:
        """The plan that such a job would get, and every worker's verdict, without running anything; with rows, a quote, too.

        `if_workers` are machines to imagine, by name or described with the fields of Device.
        """
        runtime, generation = self._options.to_send(_options(runtime), _options(generation))
        body: dict[str, Any] = {"model": model, "runtime": runtime, "generation": generation}
        if where is not None:
            body["where"] = where
        if rows is not None:
            body["rows"] = rows_to_send(rows)
        if imagined := list(if_workers):
            body["if_workers"] = imagined
        return Preview.from_raw(self._transport.post("/v1/plans/preview", body))

    def job(self, job_id: str) -> Job:
        """One job. Raises NotFound."""
        return Job(self, self._transport, self.status(job_id))

    def status(self, job_id: str) -> JobStatus:
        """One job as a frozen view. Raises NotFound."""
        return JobStatus.from_raw(self._transport.get(f"/v1/jobs/{_in_path(job_id)}"))

    def jobs(self) -> Iterator[Job]:
        """Every job, the newest first."""
        return (self._job(raw) for raw in self._pages("/v1/jobs"))

    def plan(self, plan_id: str) -> Plan:
        """One plan with its events and attempts. Raises NotFound."""
        return Plan.from_raw(self._transport.get(f"/v1/plans/{_in_path(plan_id)}"))

    def plans(self, job: Job | str | None = None, *, state: ExecutionState | str | None = None) -> Iterator[Plan]:
        """Every plan, those of the newest jobs first and each job's in order; of one job, or in one state, where that is given.

        Raises NotFound for the job.
        """
        job_id = job.id if isinstance(job, Job) else job
        return (Plan.from_raw(raw) for raw in self._pages("/v1/plans", job=job_id, state=state))

    def explain(self, job: Job | str) -> Mapping[str, Any]:
        """Where a job's rows are, which of them fit no worker, and what giving up what they ask for would bring. JSON.

        Raises NotFound.
        """
        job_id = job.id if isinstance(job, Job) else job
        answer: Mapping[str, Any] = self._transport.get(f"/v1/jobs/{_in_path(job_id)}/explain")
        return answer

    def retry(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Make a new job of a job's failed rows. Raises Conflict while it runs and where nothing failed."""
        body = {"idempotency_key": uuid.uuid4().hex if idempotency_key is None else idempotency_key}
        return self._job(self._transport.post(f"/v1/jobs/{_in_path(job_id)}/retry", body))

    def workers(self) -> list[Worker]:
        """Every worker that is there."""
        return [Worker.from_raw(raw) for raw in self._pages("/v1/workers")]

    def models(self) -> list[Model]:
        """Every model that a job may name."""
        return [Model.from_raw(raw) for raw in self._pages("/v1/models")]

    def model(self, name: str) -> Model:
        """One model by anything that a job may call it, with each digest of that name. Raises NotFound, InvalidReference."""
        return Model.from_raw(self._transport.get(f"/v1/models/{_in_path(name)}"))

    def pull(self, model: str, worker: str | None = None) -> Pull:
        """Have a worker fetch a model from the hub: this one, or any one that its operator allows it. Asking twice is harmless.

        Raises InvalidReference for what is not on the hub, NotFound for the worker, Conflict where nobody may fetch it.
        """
        body = {"model": model} if worker is None else {"model": model, "worker": worker}
        return Pull.from_raw(self._transport.post("/v1/models/pull", body))

    def download(self, download_id: str) -> Download:
        """How far a download is. Raises NotFound."""
        return Download.from_raw(self._transport.get(f"/v1/downloads/{_in_path(download_id)}"))

    def downloads(self) -> list[Download]:
        """Downloads of the last week, the newest first."""
        return [Download.from_raw(raw) for raw in self._pages("/v1/downloads")]

    def drain(self, node: str) -> Mapping[str, Any]:
        """Ask a node's workers to finish what they do and take nothing new. Raises NotFound."""
        answer: Mapping[str, Any] = self._transport.post(f"/v1/workers/{_in_path(node)}/drain")
        return answer

    def health(self) -> Mapping[str, Any]:
        """Whether the service can do its work: its database and its broker. Raises ServiceError where it cannot."""
        answer: Mapping[str, Any] = self._transport.get("/readyz")
        return answer

    def _submit(self, body: Mapping[str, Any]) -> Job:
        given = {name: value for name, value in body.items() if value is not None}
        given.setdefault("idempotency_key", uuid.uuid4().hex)
        return self._job(self._transport.post("/v1/jobs", given))

    def _job(self, raw: Mapping[str, Any]) -> Job:
        return Job(self, self._transport, JobStatus.from_raw(raw))

    def _pages(self, path: str, **filters: str | None) -> Iterator[Mapping[str, Any]]:
        after: str | int | None = None
        while True:
            page = self._transport.get(path, after=after, limit=PAGE_LENGTH, **filters)
            yield from page["data"]
            after = page.get("next")
            if not page.get("has_more") or after is None:
                return


def _options(config: RuntimeConfig | GenerationConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """What was chosen. A mapping goes as it is: the service names what is wrong with it."""
    if config is None:
        return {}
    return config.as_dict() if isinstance(config, RuntimeConfig | GenerationConfig) else dict(config)


def _in_path(name: str) -> str:
    if not name:
        raise NotFound("There is nothing without a name.")
    return quote(name, safe="")
