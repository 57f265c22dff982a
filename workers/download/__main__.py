"""What is `python -m workers.download`? Fetches one model, tells how far it is in lines of JSON, and says how that ended.

One object on its command line names the repository, the revision and the folder. Each line that it prints has an `event`:
`progress`, `done`, `busy` or `failed`.
"""

import json
import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from workers.download.fetching import Progress, Wanted, failure_of, fetch
from workers.download.staging import Busy

LONGEST_MESSAGE = 500
_speaking = threading.Lock()


def main(argument: str) -> None:
    """Fetch, and end this process whatever its threads do."""
    given = json.loads(argument)
    wanted = Wanted(repo_id=given["repo_id"], revision=given["revision"], root=Path(given["root"]), folder=given["folder"])
    try:
        fetch(wanted, lambda progress: _say("progress", **_facts(progress)))
        _say("done")
    except Busy as error:
        _say("busy", message=str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the worker hears of it
        failed = failure_of(wanted, error)
        message = _without_token(str(failed))[:LONGEST_MESSAGE]
        _say("failed", code=failed.code, message=message, is_permanent=failed.is_permanent, is_everywhere=failed.is_everywhere)
    sys.stdout.flush()
    os._exit(0)


def _facts(progress: Progress) -> dict[str, Any]:
    return asdict(progress)


def _say(event: str, **facts: Any) -> None:
    with _speaking:
        sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
        sys.stdout.flush()


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "…") if token else text


if __name__ == "__main__":
    main(sys.argv[1])
