"""What does a model reference say? Its grammar; references are hostile input.

alias           llama3-1B-chat
hub id          org/name, org/name@revision, hf:org/name@revision
local path      path:folder/name, ./folder: relative to every worker's models root; host paths are refused, since hosts differ
anything else   opaque: a directory name under the models root, if some worker advertises it

name@sha256:…   of several models that answer to an alias, hub id or directory name, the one whose digest begins so
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from ollm_service.core.errors import InvalidReference, shown

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_SHORT_SCHEME = re.compile(r"(?i)(hf|path):(.*)", re.DOTALL)
_HUB_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/@-]{0,127}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{6,64})")
_LONGEST = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReference:
    """A parsed reference. `local_path` is set for paths alone: relative to a models root, and inside it.

    `digest` is the beginning of the digest that was asked for, in place of a revision.
    """

    raw: str
    scheme: str | None
    identifier: str
    revision: str | None = None
    local_path: str | None = None
    digest: str | None = None

    @property
    def is_hub_id(self) -> bool:
        """Whether it names a repository of the hub."""
        if self.local_path is not None:
            return False
        return self.scheme == "hf" or (self.scheme is None and "/" in self.identifier and " " not in self.identifier)

    @property
    def directory_name(self) -> str:
        """The folder under a models root that holds this reference's files."""
        name = self.identifier if self.revision is None else f"{self.identifier}--{self.revision}"
        return name.replace("/", "--").replace(":", "--")


def parse_reference(text: str) -> ModelReference:
    """Parse what a user wrote.

    Raises InvalidReference for an empty, overlong or unprintable reference, an empty scheme, identifier or revision, a path
    that does not stay inside the models root, and a hub id outside the hub's grammar.
    """
    raw = text.strip()
    if not raw:
        raise InvalidReference("The model reference is empty.", param="model", remedy="Name an alias, a hub id or a path.")
    if len(raw) > _LONGEST or not raw.isprintable():
        raise InvalidReference(f"The model reference is over {_LONGEST} characters or has unprintable ones.", param="model")
    scheme, rest = _split_scheme(raw)
    if scheme == "path" or (scheme is None and _looks_like_path(rest)):
        path = inner_path(rest, raw=raw, param="model")
        return ModelReference(raw=raw, scheme=scheme, identifier=path, local_path=path)
    identifier, at, revision = rest.partition("@")
    if not identifier or (at and not revision):
        raise InvalidReference(
            f"`{shown(raw)}` has an empty name or revision.", param="model", remedy="Write name or name@revision."
        )
    pinned = _DIGEST.fullmatch(revision)
    if revision.startswith("sha256:") and pinned is None:
        raise InvalidReference(
            f"`{shown(raw)}` has no digest after `sha256:`.", param="model", remedy="Write 6 to 64 hex digits, in lower case."
        )
    reference = ModelReference(
        raw=raw,
        scheme=scheme,
        identifier=identifier,
        revision=None if pinned else revision or None,
        digest=pinned[1] if pinned else None,
    )
    if reference.is_hub_id:
        _check_hub_id(reference)
    return reference


def inner_path(text: str, *, raw: str, param: str) -> str:
    """The path in its shortest form. Raises InvalidReference unless it leads to something inside a models root."""
    path = PurePosixPath(text)
    if not path.parts:
        raise InvalidReference(f"`{shown(raw)}` names no folder of the models root.", param=param, remedy="Write path:folder.")
    if path.is_absolute() or text.startswith("~") or ".." in path.parts or "\\" in text or _DRIVE.match(text):
        raise InvalidReference(
            f"`{shown(raw)}` is not a path inside the models root.",
            param=param,
            remedy="A path is relative to OLLM_MODELS_DIR, which each worker has for itself: write path:folder or ./folder.",
        )
    return str(path)


def _split_scheme(raw: str) -> tuple[str | None, str]:
    if "://" in raw:
        scheme, _, rest = raw.partition("://")
        if not scheme:
            raise InvalidReference(f"`{shown(raw)}` has an empty scheme.", param="model")
        return scheme.lower(), rest
    short = None if _DRIVE.match(raw) else _SHORT_SCHEME.fullmatch(raw)
    return (short[1].lower(), short[2]) if short else (None, raw)


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text in {".", ".."} or bool(_DRIVE.match(text))


def _check_hub_id(reference: ModelReference) -> None:
    parts = reference.identifier.split("/")
    good = len(parts) in (1, 2) and all(_HUB_PART.fullmatch(part) for part in parts)
    good = good and not any(pair in reference.identifier for pair in ("..", "--"))
    if reference.revision is not None:
        good = good and _REVISION.fullmatch(reference.revision) is not None and ".." not in reference.revision
    if not good:
        raise InvalidReference(
            f"`{shown(reference.raw)}` is not a repository id.",
            param="model",
            remedy="Write org/name or org/name@revision, with letters, digits, dots, dashes and underscores.",
        )
