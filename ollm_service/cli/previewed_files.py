"""Which file did a preview read? Remembered on this machine, so that `submit --plan` finds its rows again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollm_service.core.errors import InvalidOption

MOST_REMEMBERED = 100


def remember(preview_id: str, file: str, prompt_column: str | None) -> None:
    """Keep where the rows of a preview came from; a failure to do so is no loss, since the file can be named again."""
    known = _known()
    known[preview_id] = {"file": str(Path(file).absolute()), "prompt_column": prompt_column}
    kept = dict(list(known.items())[-MOST_REMEMBERED:])
    place = _place()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(kept), encoding="utf-8")
        fresh.replace(place)
    except OSError:
        return


def recall(preview_id: str) -> tuple[str, str | None]:
    """The file and its prompt column. Raises InvalidOption where this machine does not know."""
    found = _known().get(preview_id)
    if not isinstance(found, Mapping) or not isinstance(found.get("file"), str):
        raise InvalidOption("FILE", f"name the file of {preview_id}, too; this machine does not remember it")
    return found["file"], found.get("prompt_column")


def read_machine(path: Path) -> Mapping[str, Any]:
    """The description of an imagined machine. Raises InvalidOption."""
    try:
        machine = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidOption("--if", f"{path} cannot be read as JSON") from error
    if not isinstance(machine, dict):
        raise InvalidOption("--if", f'{path} must hold one JSON object, such as {{"memory_bytes": 25769803776}}')
    return machine


def _place() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "ollm-service" / "previews.json"


def _known() -> dict[str, Any]:
    try:
        known = json.loads(_place().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
