"""How do results reach a reader as soon as they are recorded? As lines of JSON; nothing is held while waiting for more."""

import json
import time
from collections.abc import AsyncIterator, Sequence

import anyio
from fastapi import Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from ollm_service.coordinator.service import Service
from ollm_service.core.lifecycle import JobState
from ollm_service.store.views import ResultView

ROWS_PER_PAGE = 500
POLL_SECONDS = 0.2
LAST_CURSOR = 2**63 - 1  # what a database can compare with
MEDIA_TYPE = "application/x-ndjson"


def stream_results(
    service: Service, job_id: str, tenant_id: str, *, cursor: int, limit: int | None, wait_seconds: float
) -> Response:
    """The results after `cursor`, at most `limit` of them. Raises NotFound and DatabaseUnavailable before the first line.

    Without any result there, it waits up to `wait_seconds` for one while the job is not final. An outage after the first line
    breaks the answer off, so that no reader takes a part for the whole; it goes on from the last cursor that it has.
    """
    state, cursor = service.store.jobs.get(job_id, tenant_id).state, min(cursor, LAST_CURSOR)
    first = service.store.results.page(job_id, tenant_id, cursor=cursor, limit=_page_size(limit))
    reader = _Reader(service=service, job_id=job_id, tenant_id=tenant_id)
    lines = reader.lines(first, state=state, cursor=cursor, limit=limit, wait_seconds=wait_seconds)
    headers = {"x-job-state": state.value, "cache-control": "no-store"}
    return StreamingResponse(lines, media_type=MEDIA_TYPE, headers=headers)


class _Reader:
    def __init__(self, *, service: Service, job_id: str, tenant_id: str) -> None:
        self._service = service
        self._job_id = job_id
        self._tenant_id = tenant_id

    async def lines(
        self, page: Sequence[ResultView], *, state: JobState, cursor: int, limit: int | None, wait_seconds: float
    ) -> AsyncIterator[bytes]:
        """The lines of `page` and of those after it. Between two pages nothing is held, neither a thread nor a connection."""
        if not page and wait_seconds and not state.is_final:
            page = await self._wait(cursor, limit, wait_seconds)
        left = limit
        while page:
            yield b"".join(result_line(result) for result in page)
            cursor = page[-1].cursor
            left = None if left is None else left - len(page)
            if left == 0 or len(page) < ROWS_PER_PAGE:
                return
            page = await self._page(cursor, left)

    async def _wait(self, cursor: int, limit: int | None, seconds: float) -> Sequence[ResultView]:
        """The first page that is not empty, or an empty one after `seconds`, at the end of the job or of this process."""
        end = time.monotonic() + seconds
        while True:
            await anyio.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
            state = (await run_in_threadpool(self._service.store.jobs.get, self._job_id, self._tenant_id)).state
            page = await self._page(cursor, limit)
            if page or state.is_final or time.monotonic() >= end or self._service.stopping.is_set():
                return page

    async def _page(self, cursor: int, left: int | None) -> Sequence[ResultView]:
        page = self._service.store.results.page
        return await run_in_threadpool(page, self._job_id, self._tenant_id, cursor=cursor, limit=_page_size(left))


def _page_size(left: int | None) -> int:
    return ROWS_PER_PAGE if left is None else min(ROWS_PER_PAGE, left)


def result_line(result: ResultView) -> bytes:
    """One line. All ASCII: a raw U+2028 in it would be a line's end to some readers."""
    error = None if result.error is None else {"code": result.error.code, "message": result.error.message}
    line = {
        "row": result.row,
        "custom_id": result.custom_id,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "usage": {"prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens},
        "error": error,
        "plan_id": result.plan_id,
        "attempt": result.attempt,
        "cursor": result.cursor,
    }
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"
