"""Which models lie in a models root, what are they, and are they safe? Reads configurations and headers; loads nothing.

A model is a folder in the root, or a snapshot in the hub cache's own layout, `models--org--name/snapshots/revision`. The folders
are hostile input. A folder that holds a pickle anywhere, a link that leads out of it, something that is not a plain file, or a
checkpoint that is broken or not whole, is reported with the reason and is never used. Only plain files are opened, without
waiting on any of them, and of each no more than its kind may sensibly hold.
"""

import contextlib
import hashlib
import itertools
import json
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ollm_service.core.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, adapter_problem
from ollm_service.core.checkpoint import (
    LENGTH_BYTES,
    BrokenCheckpoint,
    header_length,
    parse_header,
    parse_object,
    profile_of,
    shard_names,
)
from ollm_service.core.errors import MisconfiguredService, printable
from ollm_service.core.gds_export import (
    EXPORT_FOLDER,
    EXPORT_MANIFEST,
    PICKLE_SUFFIXES,
    export_problem,
    origin_of,
    source_digest,
)
from ollm_service.core.model_config import ModelConfig
from ollm_service.core.profile import ModelProfile
from ollm_service.core.tensors import Tensor
from ollm_service.core.weights import tied_pair

SINGLE_WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# What decides an answer besides the weights; all of it goes into a model's digest.
_ANSWER_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", *TOKENIZER_FILES, *PROCESSOR_FILES),
)
_LONGEST_CONFIG, _LONGEST_INDEX, _LONGEST_HEADERS, _LONGEST_CACHE = 4 * 1024**2, 16 * 1024**2, 64 * 1024**2, 16 * 1024**2
_MOST_FILES, _MOST_REFS = 10_000, 1_000
_CHUNK_BYTES = 1024**2


class InspectionStopped(Exception):
    """The caller asked to stop before every model was read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folder:
    """One model's folder. `real` is its resolved place; links may lead into `homes` alone."""

    name: str
    path: PurePosixPath
    real: Path
    homes: tuple[Path, ...]
    repo_id: str | None = None
    revision: str | None = None
    refs: tuple[str, ...] = ()


class DigestCache:
    """Remembers the sha256 of files by path, inode, size and modification time, across processes if it has a file.

    Threads may share one. Processes may share its file: each adds what it learnt, and an entry that is lost or damaged is
    computed again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, str] = self._stored()

    def digest(self, path: Path, is_stopped: Callable[[], bool] = lambda: False, part: tuple[int, int] | None = None) -> str:
        """The sha256 of the file, or of the bytes of a part, from and to, in hex.

        Raises InspectionStopped, OSError, and BrokenCheckpoint for a file that changes meanwhile.
        """
        with _plain_file(path) as file:
            status = os.fstat(file.fileno())
            key = _cache_key(path, status, part)
            with self._lock:
                known = self._known.get(key)
            if known is not None:
                return known
            hasher = hashlib.sha256()
            first, last = part or (0, status.st_size)
            file.seek(first)
            left = last - first
            while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):  # no further, should it grow while it is read
                if is_stopped():
                    raise InspectionStopped
                hasher.update(chunk)
                left -= len(chunk)
            if _cache_key(path, os.fstat(file.fileno()), part) != key:
                raise BrokenCheckpoint(f"{path.name} is still being written")
        with self._lock:
            self._known[key] = hasher.hexdigest()
        return hasher.hexdigest()

    def save(self) -> None:
        """Write what is known to the file, without entries of files that are gone; a failure to do so is no loss."""
        if self._path is None:
            return
        with self._lock, contextlib.suppress(OSError):
            self._known = {key: value for key, value in (self._stored() | self._known).items() if _is_current(key)}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(self._known, file)
                os.replace(temporary, self._path)
            except OSError:
                os.unlink(temporary)

    def _stored(self) -> dict[str, str]:
        if self._path is None:
            return {}
        try:
            stored = parse_object(_read(self._path, _LONGEST_CACHE), "the digest cache")
        except (OSError, BrokenCheckpoint):
            return {}
        return {key: value for key, value in stored.items() if isinstance(value, str) and len(value) == 64}


def inspect_models(
    root: Path,
    digests: DigestCache,
    *,
    is_wanted: Callable[[ModelProfile], bool] = lambda _: True,
    is_stopped: Callable[[], bool] = lambda: False,
) -> tuple[ModelProfile, ...]:
    """Every model in the root, by path, the refused ones with `unsafe_because`. A root that does not exist holds none.

    New weights are read once as a whole, for their digest: run it on a thread of its own. Of a folder that is not wanted, by what
    `list_models` says of it, nothing is read. Raises InspectionStopped, and MisconfiguredService where the root cannot be read.
    """
    return tuple(each_model(root, digests, is_wanted=is_wanted, is_stopped=is_stopped))


def list_models(root: Path) -> tuple[ModelProfile, ...]:
    """The folders of models in the root with nothing but what their places tell: name, path, repository and revision.

    A root that does not exist holds none. Raises MisconfiguredService where it cannot be read.
    """
    return tuple(_unread(folder) for folder in _readable_folders(root))


def each_model(
    root: Path,
    digests: DigestCache,
    *,
    is_wanted: Callable[[ModelProfile], bool] = lambda _: True,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[ModelProfile]:
    """The same one by one, so that a model is known as soon as its own weights have been read."""
    folders = [folder for folder in _readable_folders(root) if is_wanted(_unread(folder))]
    try:
        for folder in folders:
            if is_stopped():
                raise InspectionStopped
            yield _inspect(folder, digests, is_stopped)
    finally:
        digests.save()


def inspect_adapter(root: Path, path: PurePosixPath) -> Adapter:
    """The adapter in a folder of the models root, given relative to it.

    Raises FileNotFoundError where there is no such folder, BrokenCheckpoint for an adapter that may not be used; both say why.
    """
    real_root, place = root.resolve(), root / path
    real = Path(os.path.realpath(place))
    if not real.is_dir():
        raise FileNotFoundError(f"{path} is not in the models folder")
    homes = (real,) if real_root in real.parents else ()
    try:
        files = _safe_files(_Folder(name=path.name, path=path, real=real, homes=homes))
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if name not in files:
                raise BrokenCheckpoint(f"it has no {name}")
        problem = adapter_problem(parse_object(_read(files[ADAPTER_CONFIG], _LONGEST_CONFIG), ADAPTER_CONFIG))
        if problem is not None:
            raise BrokenCheckpoint(problem)
        _headers(files)
        digests = DigestCache()
        lines = [f"{name} {digests.digest(files[name])}\n" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    except OSError as error:
        raise BrokenCheckpoint(f"{_shown_name(error)} cannot be read: {error.strerror}") from error
    return Adapter(folder=str(real), digest=hashlib.sha256("".join(lines).encode()).hexdigest())


def _readable_folders(root: Path) -> list[_Folder]:
    try:
        return list(_folders(root))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MisconfiguredService(f"The models folder {root} cannot be read: {error.strerror}.") from error


def _folders(root: Path) -> Iterator[_Folder]:
    real_root = root.resolve(strict=True)
    for entry in sorted(os.scandir(real_root), key=lambda entry: entry.name):
        place = Path(entry.path)
        if entry.name.startswith((".", "datasets--", "spaces--")) or not place.is_dir():
            continue
        real = Path(os.path.realpath(place))
        if entry.name.startswith("models--") and not entry.is_symlink():
            yield from _snapshots(place)
            continue
        name = printable(entry.name)
        homes = (real,) if real_root in real.parents else ()
        yield _Folder(name=name, path=PurePosixPath(name), real=real, homes=homes)


def _snapshots(repo: Path) -> Iterator[_Folder]:
    """The snapshots of one repository in the hub cache; the one that `main` names, or the only one, bears its plain name."""
    repo_id = printable(repo.name.removeprefix("models--")).replace("--", "/", 1)
    refs = dict(_refs(repo / "refs"))
    try:
        found = sorted(entry.name for entry in os.scandir(repo / "snapshots") if entry.is_dir(follow_symlinks=False))
    except OSError:
        found = []
    main = refs.get("main") or (found[0] if len(found) == 1 else None)
    for revision in found:
        shown = printable(revision)
        name = repo_id.replace("/", "--") + ("" if revision == main else f"--{shown}")
        real = repo / "snapshots" / revision
        yield _Folder(
            name=name,
            path=PurePosixPath(printable(repo.name), "snapshots", shown),
            real=real,
            homes=(real, repo / "blobs"),
            repo_id=repo_id,
            revision=shown,
            refs=tuple(sorted(ref for ref, commit in refs.items() if commit == revision)),
        )


def _refs(folder: Path) -> Iterator[tuple[str, str]]:
    """The branches and tags of a repository in the hub cache, with the revision that each names."""
    count = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            count += 1
            if count > _MOST_REFS:
                return
            place = Path(parent, name)
            with contextlib.suppress(OSError, BrokenCheckpoint, UnicodeDecodeError):
                yield printable(place.relative_to(folder).as_posix()), _read(place, 256).decode().strip()


def _inspect(folder: _Folder, digests: DigestCache, is_stopped: Callable[[], bool]) -> ModelProfile:
    try:
        profile = _read_model(folder, digests, is_stopped)
    except BrokenCheckpoint as error:
        profile = _refused(folder, str(error))
    except OSError as error:
        profile = _refused(folder, f"{_shown_name(error)} cannot be read: {error.strerror}")
    return replace(profile, repo_id=folder.repo_id, revision=folder.revision, refs=folder.refs)


def _unread(folder: _Folder) -> ModelProfile:
    place = ModelProfile(name=folder.name, path=folder.path, digest="")
    return replace(place, repo_id=folder.repo_id, revision=folder.revision, refs=folder.refs)


def _refused(folder: _Folder, reason: str) -> ModelProfile:
    return replace(_unread(folder), unsafe_because=reason)


def _read_model(folder: _Folder, digests: DigestCache, is_stopped: Callable[[], bool]) -> ModelProfile:
    if "\\" in folder.path.as_posix():
        raise BrokenCheckpoint("its name is not plain text")
    files = _safe_files(folder)
    if any(name.lower() == ADAPTER_CONFIG for name in files):
        raise BrokenCheckpoint(
            # With it and peft, transformers would load it on top, or another model that the file names.
            f"it holds an adapter ({ADAPTER_CONFIG}): name its folder as adapter_dir together with its model, "
            "or merge the adapter into the model; weights that were not inspected would be loaded beside a model's own"
        )
    if "config.json" not in files:
        raise BrokenCheckpoint("it has no config.json; each model is one folder directly in the models folder")
    config = parse_object(_read(files["config.json"], _LONGEST_CONFIG), "config.json")
    headers = _headers(files)
    weights = _weight_files(files, headers)
    tokenizer_config: Mapping[str, Any] = {}
    if "tokenizer_config.json" in files:
        tokenizer_config = parse_object(_read(files["tokenizer_config.json"], _LONGEST_CONFIG), "tokenizer_config.json")
    if not any(name in files for name in TOKENIZER_FILES) and not {"vocab.json", "merges.txt"} <= files.keys():
        raise BrokenCheckpoint("it has no tokenizer")
    if tokenizer_config.get("auto_map") and "tokenizer.json" not in files:
        raise BrokenCheckpoint("it needs remote code: its tokenizer is a program of its own")
    profile = profile_of(
        name=folder.name,
        path=folder.path,
        digest="",
        config=config,
        tensors=_loaded_tensors(files, {name: headers[name] for name in weights}, config, digests, is_stopped),
        has_processor=any(name in files for name in PROCESSOR_FILES),
        has_chat_template=bool(tokenizer_config.get("chat_template")) or "chat_template.jinja" in files,
    )
    problem = _export_problem(files, weights, digests, is_stopped)
    has_export = problem is None and EXPORT_MANIFEST in files
    export = [name for name in files if has_export and name.startswith(f"{EXPORT_FOLDER}/")]
    digest = _digest(files, (*weights, *export), digests, is_stopped)
    return replace(profile, digest=digest, has_gds_export=has_export, gds_export_problem=problem)


def _export_problem(
    files: Mapping[str, Path], weights: tuple[str, ...], digests: DigestCache, is_stopped: Callable[[], bool]
) -> str | None:
    """Why the folder's raw export, if it has one, cannot be used; the model itself may still be."""
    if EXPORT_MANIFEST not in files:
        return None
    try:
        manifest = parse_object(_read(files[EXPORT_MANIFEST], _LONGEST_INDEX), EXPORT_MANIFEST)
        sizes = {name: path.stat().st_size for name, path in files.items() if name.startswith(f"{EXPORT_FOLDER}/")}
        source = None
        if origin_of(manifest) is not None:
            source = source_digest({name: digests.digest(files[name], is_stopped) for name in ("config.json", *weights)})
        return export_problem(manifest, sizes, source)
    except BrokenCheckpoint as error:
        return str(error)


def _safe_files(folder: _Folder) -> dict[str, Path]:
    """Every file of the folder by its relative name. Raises BrokenCheckpoint for a tree that must not be touched."""
    if not folder.homes:
        raise BrokenCheckpoint("it is a link that leaves the models folder")
    found: dict[str, Path] = {}
    waiting = [folder.real]
    while waiting:
        with os.scandir(waiting.pop()) as listing:
            entries = list(itertools.islice(listing, _MOST_FILES))
        if len(found) + len(waiting) + len(entries) >= _MOST_FILES:
            raise BrokenCheckpoint(f"it has {_MOST_FILES:,} files or more")
        for entry in entries:
            name = Path(entry.path).relative_to(folder.real).as_posix()
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
                continue
            if Path(name.lower()).suffix in PICKLE_SUFFIXES:
                raise BrokenCheckpoint(f"{printable(name)} may hold a pickle, which runs code when it is loaded; use safetensors")
            target = Path(os.path.realpath(entry.path))
            if entry.is_symlink() and not any(home in target.parents for home in folder.homes):
                raise BrokenCheckpoint(f"{printable(name)} is a link that leaves the model's folder")
            if not target.is_file():
                raise BrokenCheckpoint(f"{printable(name)} is not a plain file")
            found[name] = target
    return found


def _weight_files(files: Mapping[str, Path], headers: Mapping[str, tuple[Tensor, ...]]) -> tuple[str, ...]:
    """The files that loading reads, as transformers picks them. Raises BrokenCheckpoint where one is not whole."""
    if SINGLE_WEIGHTS in files:
        return (SINGLE_WEIGHTS,)
    if WEIGHTS_INDEX not in files:
        raise BrokenCheckpoint(f"it has neither {SINGLE_WEIGHTS} nor {WEIGHTS_INDEX}")
    index = parse_object(_read(files[WEIGHTS_INDEX], _LONGEST_INDEX), WEIGHTS_INDEX)
    shards = shard_names(index, WEIGHTS_INDEX)
    held = {name: {tensor.name for tensor in tensors} for name, tensors in headers.items()}
    for tensor, shard in shards.items():
        if shard not in held:
            raise BrokenCheckpoint(f"the shard {printable(shard)} is missing")
        if tensor not in held[shard]:
            raise BrokenCheckpoint(f"the shard {printable(shard)} lacks the tensor {tensor[:80]!r}")
    return tuple(sorted(set(shards.values())))


def _loaded_tensors(
    files: Mapping[str, Path],
    weights: Mapping[str, tuple[Tensor, ...]],
    config: Mapping[str, Any],
    digests: DigestCache,
    is_stopped: Callable[[], bool],
) -> list[Tensor]:
    """The tensors of the weight files, without a head that is a copy of the embedding to which it is tied."""
    tensors = [tensor for held in weights.values() for tensor in held]
    pair = tied_pair(tensors, ModelConfig.read(config))
    if pair is None:
        return tensors

    def digest(tensor: Tensor) -> str:
        place = files[next(name for name, held in weights.items() if any(tensor is other for other in held))]
        with _plain_file(place) as file:
            begin = LENGTH_BYTES + header_length(file.read(LENGTH_BYTES), os.fstat(file.fileno()).st_size, printable(place.name))
        return digests.digest(place, is_stopped, (begin + tensor.span[0], begin + tensor.span[1]))

    head, embedding = pair
    return [tensor for tensor in tensors if tensor is not head] if digest(head) == digest(embedding) else tensors


def _headers(files: Mapping[str, Path]) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of every safetensors file, wanted or not: one that is broken makes the whole folder doubtful."""
    headers: dict[str, tuple[Tensor, ...]] = {}
    left = _LONGEST_HEADERS
    for name in sorted(name for name in files if name.endswith(".safetensors")):
        shown = printable(name)
        with _plain_file(files[name]) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = header_length(file.read(LENGTH_BYTES), file_bytes, shown)
            left -= length
            if left < 0:
                raise BrokenCheckpoint(f"its safetensors headers together have more than {_LONGEST_HEADERS:,} bytes")
            headers[name] = parse_header(file.read(length), file_bytes - LENGTH_BYTES - length, shown)
    return headers


def _digest(files: Mapping[str, Path], weights: tuple[str, ...], digests: DigestCache, is_stopped: Callable[[], bool]) -> str:
    """sha256 over the names and digests of all that decides an answer: weights, an export of them, configuration, tokenizer."""
    names = sorted({*weights, *(name for name in _ANSWER_FILES if name in files)})
    lines = [f"{name} {digests.digest(files[name], is_stopped)}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def _plain_file(path: Path) -> Iterator[BinaryIO]:
    """The file, opened without waiting on a pipe or a device. Raises BrokenCheckpoint where it is not a plain one."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BrokenCheckpoint(f"{printable(path.name)} is not a plain file")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BrokenCheckpoint(f"{printable(path.name)} is not a plain file")
        yield file


def _read(path: Path, most: int) -> bytes:
    with _plain_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise BrokenCheckpoint(f"{printable(path.name)} is larger than {most:,} bytes")
    return content


def _cache_key(path: Path, status: os.stat_result, part: tuple[int, int] | None) -> str:
    return json.dumps([os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns, *(part or ())])


def _is_current(key: str) -> bool:
    try:
        path, _, _, _, *part = json.loads(key)
        return _cache_key(Path(path), os.stat(path), (part[0], part[1]) if part else None) == key
    except (OSError, ValueError, TypeError, LookupError):
        return False


def _shown_name(error: OSError) -> str:
    return printable(Path(os.fsdecode(error.filename)).name) if isinstance(error.filename, str | bytes) else "a file"
