"""What can a user do with a job of theirs: look at it, read its results while it runs, wait, cancel, retry?"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ollm_service.client.transport import Patience, Transport
from ollm_service.client.views import Amended, Counts, JobStatus, Plan, Result
from ollm_service.core.errors import OllmError
from ollm_service.core.lifecycle import JobState

if TYPE_CHECKING:
    from ollm_service.client.service import Client

LONG_POLL_SECONDS = 20.0
PAGE_ROWS = 1000
# The server holds a quiet answer open for the long poll; silence for much longer means that it is gone.
SILENCE_SECONDS = LONG_POLL_SECONDS + 30.0


class Job:
    """A job of the service, as it was when last asked for; `refresh()` asks again.

    Every method may raise an OllmError, ServiceUnreachable among them.
    """

    def __init__(self, client: "Client", transport: Transport, status: JobStatus) -> None:
        self._client = client
        self._transport = transport
        self._status = status

    def __repr__(self) -> str:
        return f"Job({self.id}, {self.state}, {self.counts.done} of {self.row_count} rows)"

    @property
    def id(self) -> str:
        """Its id, `job_…`."""
        return self._status.id

    @property
    def model(self) -> str:
        """The model reference as it was submitted."""
        return self._status.model

    @property
    def state(self) -> JobState:
        """Its state when last asked for."""
        return self._status.state

    @property
    def is_final(self) -> bool:
        """Whether it had ended when last asked for."""
        return self.state.is_final

    @property
    def row_count(self) -> int:
        """How many rows it has."""
        return self._status.row_count

    @property
    def counts(self) -> Counts:
        """Its rows by how they ended."""
        return self._status.counts

    @property
    def plans_total(self) -> int:
        """How many plans it was split into."""
        return self._status.plans_total

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Its first hundred plans; `Client.plans(job)` pages through all."""
        return self._status.plans

    @property
    def status(self) -> JobStatus:
        """All of this as one frozen view."""
        return self._status

    def refresh(self) -> "Job":
        """Ask the service again, and return this job."""
        self._status = self._client.status(self.id)
        return self

    def results(self, *, follow: bool = True, after: int = 0) -> Iterator[Result]:
        """Its results in the order in which they were written, each exactly once.

        With `follow` they come as micro-batches end, until the job has; otherwise what is there now. `after` is the cursor of
        the last result that the caller has already. A broken connection is taken up where it broke.
        """
        cursor, patience = after, None
        while True:
            was_final = self.is_final
            start = cursor
            try:
                for result in self._page(cursor, wait=follow and not was_final):
                    if result.cursor > cursor:
                        cursor, patience = result.cursor, None
                        yield result
                if cursor == start:
                    if was_final or not follow:
                        return
                    self.refresh()
            except OllmError as error:
                patience = self._persevere(error, patience)

    def wait(self, timeout: float | None = None) -> "Job":
        """Wait until it has ended, and return it. Raises TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.refresh().is_final:
            left = LONG_POLL_SECONDS if deadline is None else min(LONG_POLL_SECONDS, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"{self.id} is still {self.state} after {timeout:g} s.")
            self._await_change(left)
        return self

    def cancel(self) -> "Job":
        """Ask for its end, and return it; rows that are answered stay answered."""
        self._status = JobStatus.from_raw(self._transport.post(f"/v1/jobs/{self.id}/cancel"))
        return self

    def amend(
        self, runtime: Mapping[str, Any] | None = None, *, where: str | None = None, skip_rows: Iterable[int] = ()
    ) -> Amended:
        """Change how its plans run that nobody has begun, and give up rows of theirs; the others stay as they are.

        `runtime` has the options to change alone, None for one that goes back to its default; `where="any"` demands no labels
        any more. Raises Conflict where it has ended, or where somebody else amends it at this moment.
        """
        body = {"runtime": dict(runtime or {}), "where": where, "skip_rows": list(skip_rows)}
        raw = self._transport.post(f"/v1/jobs/{self.id}/amend", {name: value for name, value in body.items() if value})
        self._status = JobStatus.from_raw(raw)
        return Amended.from_raw(raw)

    def retry(self, *, idempotency_key: str | None = None) -> "Job":
        """Make a new job of its failed rows. Raises Conflict while it runs and where nothing failed."""
        return self._client.retry(self.id, idempotency_key=idempotency_key)

    def _page(self, cursor: int, *, wait: bool) -> Iterator[Result]:
        wait_seconds = LONG_POLL_SECONDS if wait else None
        with self._transport.stream(
            f"/v1/jobs/{self.id}/results",
            read_seconds=SILENCE_SECONDS,
            cursor=cursor,
            limit=PAGE_ROWS,
            wait_seconds=wait_seconds,
        ) as lines:
            for line in lines:
                yield Result.from_raw(json.loads(line))

    def _await_change(self, seconds: float) -> None:
        """Return when a row more is answered, or after so many seconds."""
        try:
            with self._transport.stream(
                f"/v1/jobs/{self.id}/results",
                read_seconds=seconds + 30,
                cursor=self.counts.done,
                limit=1,
                wait_seconds=seconds,
            ) as lines:
                for _ in lines:
                    return
        except OllmError as error:
            self._persevere(error, None)

    def _persevere(self, error: OllmError, patience: Patience | None) -> Patience:
        again = self._transport.patience_with(error)
        patience = patience or again
        patience.pause_or_raise(error)
        return patience
