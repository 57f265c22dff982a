"""How does a model come from the hub? Listed, measured against the disk, fetched, checked, and made visible in one step.

`huggingface_hub` speaks with the hub; it reads `HF_ENDPOINT` and `HF_TOKEN` for itself, and neither leaves this process. Its own
`hf_hub_download` begins a file anew after a kill, so files are fetched here by its `http_get`, into parts that are gone on with.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented as its place

from ollm_service.inspection import WEIGHTS_INDEX
from workers.download.choice import CONFIG, HubFile, chosen, missing
from workers.download.staging import NotOurs, Staging

SPARE_BYTES = 1024**3  # what a disk keeps free: logs, KV files and the system share it
STREAMS = 4
TELL_SECONDS = 0.5
_LONGEST_CONFIG = 16 * 1024**2
_FORBIDDEN = (401, 403)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to fetch, and into which folder of the models root."""

    repo_id: str
    revision: str | None
    root: Path
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far it is, in bytes; `commit` is what the revision means."""

    bytes_done: int
    bytes_total: int
    commit: str


class FetchFailed(Exception):
    """It cannot be fetched. `is_permanent`: trying again here cannot help; `is_everywhere`: nor on any other worker."""

    def __init__(self, code: str, message: str, *, is_permanent: bool = True, is_everywhere: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_permanent = is_permanent
        self.is_everywhere = is_everywhere


def fetch(wanted: Wanted, tell: Callable[[Progress], None]) -> None:
    """Fetch the model, going on with what is there. `tell` is called about twice a second, from another thread.

    Raises Busy where another process fetches it, FetchFailed, and what `failure_of` explains.
    """
    with Staging.locked(wanted.root, wanted.folder) as staging:
        if staging.final.is_dir() and not _missing_in(staging.final):
            return
        commit, files = _listed(wanted)
        staging.open(wanted.repo_id, commit)
        total = sum(file.size for file in files)
        _check_room(wanted, staging, files)

        def progress() -> None:
            tell(Progress(bytes_done=min(total, staging.bytes_there()), bytes_total=total, commit=commit))

        with _Teller(progress):
            _fetch_whole(wanted, staging, commit, files)
        staging.publish()


def failure_of(wanted: Wanted, error: Exception) -> FetchFailed:
    """What to say of an error, and whether trying again may help."""
    name = wanted.repo_id if wanted.revision is None else f"{wanted.repo_id}@{wanted.revision}"
    endpoint = HfApi().endpoint
    if isinstance(error, FetchFailed):
        return error
    if isinstance(error, NotOurs):
        return FetchFailed("folder_in_the_way", str(error))
    if isinstance(error, GatedRepoError):
        how = "accept its terms there, and set HF_TOKEN on the worker"
        return FetchFailed("gated", f"{wanted.repo_id} is gated at {endpoint}: {how}")
    if isinstance(error, RepositoryNotFoundError):
        why = "it may be private: then set HF_TOKEN on the worker"
        return FetchFailed("no_such_repository", f"there is no {wanted.repo_id} at {endpoint} that this worker may see; {why}")
    if isinstance(error, RevisionNotFoundError):
        return FetchFailed("no_such_revision", f"{wanted.repo_id} has no revision {wanted.revision}", is_everywhere=True)
    if isinstance(error, HFValidationError):
        return FetchFailed("no_such_repository", f"{name} is no repository id of the hub", is_everywhere=True)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in _FORBIDDEN:
            return FetchFailed("forbidden", f"{endpoint} refuses {name} ({status}); set HF_TOKEN on the worker")
        return FetchFailed("hub_unreachable", f"{endpoint} answered {status} for {name}", is_permanent=False)
    if isinstance(error, PermissionError | ValueError):
        return FetchFailed("unfetchable", f"{name} cannot be fetched: {error}")
    return FetchFailed("broken_off", f"fetching {name} broke off: {type(error).__name__}: {error}", is_permanent=False)


def _listed(wanted: Wanted) -> tuple[str, tuple[HubFile, ...]]:
    """The commit that the revision means, and its files that are fetched."""
    info = HfApi().model_info(wanted.repo_id, revision=wanted.revision, files_metadata=True)
    listed = [
        HubFile(name=sibling.rfilename, size=sibling.size or 0, sha256=sibling.lfs.sha256 if sibling.lfs else None)
        for sibling in info.siblings or ()
    ]
    if info.sha is None:
        raise FetchFailed("hub_unreadable", "the hub does not say which commit this is", is_permanent=False)
    files = chosen(listed)
    if not any(file.name.endswith(".safetensors") for file in files):
        raise FetchFailed(
            "no_safetensors", f"{wanted.repo_id} has no safetensors weights, and others are never loaded", is_everywhere=True
        )
    return info.sha, files


def _check_room(wanted: Wanted, staging: Staging, files: Sequence[HubFile]) -> None:
    needed = sum(file.size for file in files) - staging.bytes_there()
    free = shutil.disk_usage(wanted.root).free
    if needed > 0 and free < needed + SPARE_BYTES:
        raise FetchFailed(
            "disk_too_small",
            f"{wanted.repo_id} needs {needed:,} bytes more and {SPARE_BYTES:,} to spare; the models folder has {free:,} free",
        )


def _fetch_whole(wanted: Wanted, staging: Staging, commit: str, files: Sequence[HubFile]) -> None:
    """Fetch every file; what is small first, since it tells whether the rest is worth its time. Tried anew once if not whole."""
    small = [file for file in files if not file.is_weights]
    listed = {file.name for file in files if file.size > 0}
    _fetch_all(wanted, staging, commit, small)
    lacking = missing(listed, _json(staging.files / CONFIG), _json(staging.files / WEIGHTS_INDEX))
    if lacking:
        for file in small:
            staging.drop(file.name)
        _fetch_all(wanted, staging, commit, small)
        lacking = missing(listed, _json(staging.files / CONFIG), _json(staging.files / WEIGHTS_INDEX))
    if lacking:
        raise FetchFailed("incomplete", f"{wanted.repo_id} lacks {', '.join(lacking)}", is_everywhere=True)
    _fetch_all(wanted, staging, commit, [file for file in files if file.is_weights])
    lacking = _missing_in(staging.files)
    if lacking:
        raise FetchFailed("incomplete", f"what came of {wanted.repo_id} lacks {', '.join(lacking)}", is_permanent=False)


def _fetch_all(wanted: Wanted, staging: Staging, commit: str, files: Sequence[HubFile]) -> None:
    pool = ThreadPoolExecutor(STREAMS)
    try:
        running = [pool.submit(_fetch_file, wanted, staging, commit, file) for file in files]
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        # After a failure this process ends: nobody waits for the other files.
        pool.shutdown(wait=False, cancel_futures=True)


def _fetch_file(wanted: Wanted, staging: Staging, commit: str, file: HubFile) -> None:
    """Fetch one file, unless it is there; what is not what the hub says it is once more from its beginning."""
    whole, part = staging.files / file.name, staging.parts / file.name
    if whole.is_file() and whole.stat().st_size == file.size:
        return
    whole.parent.mkdir(parents=True, exist_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(wanted.repo_id, file.name, revision=commit)
    for is_last in (False, True):
        with part.open("ab") as output:
            have = output.tell()
            if have > file.size:
                output.truncate(0)
                have = 0
            # Compressed on the way, a file could not be gone on with.
            headers = build_hf_headers() | {"Accept-Encoding": "identity"}
            http_get(url, output, resume_size=have, headers=headers, expected_size=file.size)
            output.flush()
            os.fsync(output.fileno())  # its size stands for its content when this is gone on with
        if file.sha256 is None or _sha256(part) == file.sha256:
            break
        part.unlink()
        if is_last:
            raise FetchFailed(
                "other_content", f"{file.name} came twice with other content than the hub lists", is_permanent=False
            )
    part.replace(whole)


def _missing_in(folder: Path) -> list[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 0}
    return missing(names, _json(folder / CONFIG), _json(folder / WEIGHTS_INDEX))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path) -> Mapping[str, Any] | None:
    try:
        if path.stat().st_size > _LONGEST_CONFIG:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


class _Teller:
    """Tells the progress again and again, from the beginning of the block to its end."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Teller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._tell()
            if self._stop.wait(TELL_SECONDS):
                self._tell()
                return
