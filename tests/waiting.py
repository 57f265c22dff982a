"""When has it happened? Waiting on a condition with a timeout, instead of sleeping."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.02


def wait_for(condition: Callable[[], T | None], *, timeout: float, what: str) -> T:
    """Return the first truthy value of ``condition``, asked every 20 ms.

    Raises AssertionError naming ``what`` when ``timeout`` seconds pass first. What ``condition`` raises is not caught.
    """
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"waited {timeout:g} s in vain for {what}; last seen: {value!r}")
        pause.wait(POLL_SECONDS)
