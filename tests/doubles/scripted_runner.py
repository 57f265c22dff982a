"""What would a runner answer? Anything a test wants, by the real protocol and without torch or a model.

Run it in the place of the real one: `OLLM_RUNNER_COMMAND="PYTHON -m tests.doubles.scripted_runner"`. A row's answer is its prompt
in capitals (the last message's content for `messages`). Words in a prompt steer what happens when the row is in flight:

    [crash]         the runner is killed by SIGSEGV
    [crash-batch]   the same, but only while the row is not alone
    [exit]          it ends with exit code 3
    [oom]           it ends as Python does without memory
    [hang]          it says nothing more and ignores `Stop`
    [stubborn]      it says `Progress` for ever and ignores `Stop`
    [slow=SECONDS]  the micro-batch takes that long; `Stop` is heeded between steps
    [fail]          the attempt fails; [fail-permanently] for good
    [row-error]     the row gets an error
    [garbage]       it sends bytes that are no message
    [where=FILE]    its process id is appended to the file

Options: `--load-seconds S` for a model that is not warm, `--micro-batch N` at most, `--fail-pass ID` reports that planned pass as
failed when rows are in flight and none is answered, `--die-loading`, `--die-loading-generic` the same for a plan without passes,
`--leave-after-failure`: it ends when it has reported that a plan or its passes failed.
"""

import argparse
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ollm_service.core.leasing import RowError, RowResult, WorkRow
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.passes import Applied, Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId, SpecializationState
from ollm_service.core.wire import (
    LENGTH_BYTES,
    AttemptFailed,
    BatchDone,
    BatchStarted,
    DeviceSpeed,
    Execute,
    Finished,
    Hello,
    Loaded,
    Message,
    Progress,
    SpecializationFailed,
    Speed,
    Stop,
    Stopped,
    decode_message,
    encode_message,
)

STEP_SECONDS = 0.02
SPEED = DeviceSpeed(memory_rate=2e9, arithmetic={"float32": 3e9})


class Told(Exception):
    """The plan ends here, with this last message."""

    def __init__(self, message: Message) -> None:
        super().__init__(type(message).__name__)
        self.message = message


class ScriptedRunner:
    """Serves one socket until it ends."""

    def __init__(self, connection: socket.socket, options: argparse.Namespace) -> None:
        self._connection = connection
        self._options = options
        self._inbox: queue.SimpleQueue[Execute | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._warm: str | None = None

    def serve(self) -> None:
        """Answer every Execute; returns when the worker is gone."""
        threading.Thread(target=self._listen, daemon=True).start()
        self._say(Hello(pid=os.getpid(), versions={"scripted": "1"}))
        self._say(Speed(devices={"cpu": SPEED}))
        while (order := self._inbox.get()) is not None:
            try:
                self._execute(order)
            except Told as end:
                self._say(end.message)
                if self._options.leave_after_failure and isinstance(end.message, (AttemptFailed, SpecializationFailed)):
                    return
            else:
                self._say(Finished(measured={"peak_host_bytes": 1.0}))

    def _listen(self) -> None:
        with self._connection.makefile("rb") as stream:
            while header := stream.read(LENGTH_BYTES):
                message = decode_message(stream.read(int.from_bytes(header, "big")))
                if isinstance(message, Execute):
                    self._stop.clear()
                    self._inbox.put(message)
                elif isinstance(message, Stop):
                    self._stop.set()
        os._exit(0)  # the worker is gone, whatever this process is at

    def _say(self, message: Message) -> None:
        self._connection.sendall(encode_message(message))

    def _execute(self, order: Execute) -> None:
        was_warm = self._warm == order.profile.digest
        if self._options.die_loading or (self._options.die_loading_generic and not _is_specialized(order)):
            self._say(Progress(stage="loading"))
            os.kill(os.getpid(), signal.SIGKILL)
        if not was_warm:
            self._pause(self._options.load_seconds)
        self._warm = order.profile.digest
        self._say(Loaded(seconds=0.0 if was_warm else self._options.load_seconds, was_warm=was_warm))
        self._fail_pass(order)
        size = min(order.placement.micro_batch, self._options.micro_batch)
        for start in range(0, len(order.rows), size):
            self._pause(0)
            self._answer(order, order.rows[start : start + size])

    def _fail_pass(self, order: Execute) -> None:
        failing = self._options.fail_pass
        if failing not in order.runtime_plan.specialization_pass_ids or not _is_specialized(order):
            return
        self._say(BatchStarted(rows=tuple(row.row for row in order.rows)))
        reason = "the script wants it to fail"
        outcomes: dict[PassId, PassOutcome] = {PassId(failing): Failed(reason=reason, error_type="ScriptedFailure")}
        raise Told(SpecializationFailed(outcomes=outcomes, reason=reason, error_type="ScriptedFailure"))

    def _answer(self, order: Execute, rows: Sequence[WorkRow]) -> None:
        self._say(BatchStarted(rows=tuple(row.row for row in rows)))
        prompts = [_text_of(row) for row in rows]
        for prompt in prompts:
            self._misbehave(prompt, is_alone=len(rows) == 1)
        results = tuple(_result(row, prompt) for row, prompt in zip(rows, prompts, strict=True))
        tokens = float(sum(result.completion_tokens for result in results))
        self._say(BatchDone(results=results, outcomes=_outcomes(order), measured={"tokens": tokens}))

    def _misbehave(self, prompt: str, *, is_alone: bool) -> None:
        words = dict(re.findall(r"\[([a-z-]+)=?([^\]]*)\]", prompt))
        if "where" in words:
            with Path(words["where"]).open("a", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")
        if "crash" in words or ("crash-batch" in words and not is_alone):
            os.kill(os.getpid(), signal.SIGSEGV)
        if "exit" in words:
            os._exit(3)
        if "oom" in words:
            sys.stderr.write("MemoryError\n")
            sys.stderr.flush()
            os._exit(1)
        if "garbage" in words:
            self._connection.sendall(b"\x00\x00\x00\x05hello")
        if "hang" in words:
            threading.Event().wait()
        while "stubborn" in words:
            self._say(Progress(stage="generating"))
            threading.Event().wait(STEP_SECONDS)
        if "fail" in words or "fail-permanently" in words:
            permanent = "fail-permanently" in words
            raise Told(
                AttemptFailed(
                    stage="generating", code="scripted", message="as told", error_type="Scripted", is_permanent=permanent
                )
            )
        self._pause(float(words.get("slow") or 0))

    def _pause(self, seconds: float) -> None:
        """Wait, and leave the plan when asked to stop."""
        if self._stop.wait(timeout=seconds):
            raise Told(Stopped())


def _is_specialized(order: Execute) -> bool:
    return order.runtime_plan.specialization_state is SpecializationState.PLANNED


def _outcomes(order: Execute) -> dict[PassId, PassOutcome]:
    if not _is_specialized(order):
        return {}
    resident = order.placement.kv_cache_strategy is KVCacheStrategy.RESIDENT
    outcomes: dict[PassId, PassOutcome] = {}
    for pass_id in order.runtime_plan.specialization_pass_ids:
        idle = pass_id is PassId.DISK_CACHE and resident
        outcomes[pass_id] = NotNeeded(reason="the KV cache is resident") if idle else Applied(evidence="1 call")
    return outcomes


def _text_of(row: WorkRow) -> str:
    if row.prompt is not None:
        return row.prompt
    last: Any = (row.messages or ({"content": ""},))[-1]
    content = last.get("content", "")
    return content if isinstance(content, str) else json.dumps(content)


def _result(row: WorkRow, prompt: str) -> RowResult:
    if "[row-error]" in prompt:
        return RowResult(row=row.row, error=RowError(code="generation_failed", message="as told"))
    tokens = len(prompt.split())
    return RowResult(row=row.row, text=prompt.upper(), finish_reason="stop", prompt_tokens=tokens, completion_tokens=tokens)


def main() -> None:
    """Serve the socket whose descriptor the worker passed."""
    parser = argparse.ArgumentParser(description="A runner that answers by a script.")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--fail-pass", default="")
    parser.add_argument("--die-loading", action="store_true")
    parser.add_argument("--die-loading-generic", action="store_true")
    parser.add_argument("--leave-after-failure", action="store_true")
    options = parser.parse_args()
    ScriptedRunner(socket.socket(fileno=options.fd), options).serve()


if __name__ == "__main__":
    main()
