"""What do users do meanwhile? Submit jobs of several kinds, cancel some, and read results as they come, through every outage."""

import itertools
import json
import random
import threading
from collections.abc import Callable
from typing import Any

import httpx

from tests.chaos.history import Acknowledged
from tests.e2e.scripted_jobs import MODEL, rows_of
from tests.e2e.service_calls import ServiceCalls

PAUSE_SECONDS = 0.25
OUTAGE_SECONDS = 60.0


class Users:
    """Two threads: one submits and cancels, one reads. `acknowledged` holds what they were told; `problems`, what broke them."""

    def __init__(self, base_url: str, seed: int, *, all_nodes: frozenset[str], nodes_with_disk: frozenset[str]) -> None:
        self.acknowledged: dict[str, Acknowledged] = {}
        self.problems: list[BaseException] = []
        self._base_url = base_url
        self._draw = random.Random(seed)
        self._all_nodes, self._nodes_with_disk = all_nodes, nodes_with_disk
        self._submissions_end, self._end = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in (self._submit, self._read)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop_submitting(self) -> None:
        """Return when the submission under way is acknowledged."""
        self._submissions_end.set()
        self._threads[0].join(timeout=2 * OUTAGE_SECONDS)

    def stop(self) -> None:
        """End both threads."""
        self._submissions_end.set()
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=2 * OUTAGE_SECONDS)

    def _guarded(self, work: Callable[[ServiceCalls], None]) -> None:
        calls = ServiceCalls(self._base_url)
        try:
            work(calls)
        except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
            self.problems.append(error)
        finally:
            calls.close()

    def _submit(self, calls: ServiceCalls) -> None:
        for number in itertools.count():
            if self._submissions_end.is_set():
                return
            rows, fields, nodes = self._draw_job(number)
            job = calls.submit_through_outages(MODEL, rows, timeout=OUTAGE_SECONDS, **fields)
            self.acknowledged[job["id"]] = Acknowledged(row_count=len(rows), nodes=nodes)
            self._submissions_end.wait(self._draw.random())
            if self._draw.random() < 0.1:
                calls.cancel_through_outages(job["id"], timeout=OUTAGE_SECONDS)

    def _draw_job(self, number: int) -> tuple[list[dict[str, str]], dict[str, Any], frozenset[str]]:
        """A job's rows, its other fields, and the nodes that may run it."""
        rows = rows_of(
            self._draw.choice([1, 20, 100, 300, 600]), f"job-{number}", f"[slow={self._draw.choice([0.002, 0.01, 0.02])}]"
        )
        if self._draw.random() < 0.15:
            self._draw.choice(rows)["prompt"] += f" {self._draw.choice(['[crash]', '[crash-batch]', '[row-error]', '[fail]'])}"
        fields: dict[str, Any] = {"priority": self._draw.randrange(3)}
        kind = self._draw.random()
        if kind < 0.2:
            node = self._draw.choice(sorted(self._all_nodes))
            return rows, {**fields, "where": f'side == "{node}"'}, frozenset({node})
        if kind < 0.45:
            return rows, {**fields, "runtime": {"kv_cache_strategy": "paged"}}, self._nodes_with_disk
        if kind < 0.5:
            return rows, {**fields, "deadline_seconds": 5}, self._all_nodes
        return rows, fields, self._all_nodes

    def _read(self, calls: ServiceCalls) -> None:
        """Read every job from where the reader was, again and again; a reader never sees a cursor twice or out of order."""
        while not self._end.is_set():
            for job_id, told in list(self.acknowledged.items()):
                self._read_on(calls, job_id, told)
            self._end.wait(PAUSE_SECONDS)

    def _read_on(self, calls: ServiceCalls, job_id: str, told: Acknowledged) -> None:
        last = max(told.seen, default=0)
        if last == told.row_count:
            return
        try:
            answer = calls.get(f"/v1/jobs/{job_id}/results", cursor=last)
        except httpx.TransportError:
            return
        if answer.status_code == 503:
            return
        assert answer.status_code == 200, answer.text
        for result in (json.loads(line) for line in answer.text.splitlines() if line):
            assert result["cursor"] == last + 1, f"{job_id}: cursor {result['cursor']} came after {last}"
            last = result["cursor"]
            told.seen[last] = (result["row"], result["text"])
