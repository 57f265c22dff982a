"""Which files of a repository are fetched, and what is missing for a whole model?

The list of what is fetched is closed: configuration, safetensors and their index, what tokenizers, processors and chat templates
are read from, and a raw export. A file that could hold a pickle or code is never among them.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from ollm_service.core.checkpoint import BrokenCheckpoint, shard_names
from ollm_service.core.gds_export import EXPORT_FOLDER, PICKLE_SUFFIXES
from ollm_service.inspection import PROCESSOR_FILES, SINGLE_WEIGHTS, TOKENIZER_FILES, WEIGHTS_INDEX

CONFIG = "config.json"
_ALLOWED = (
    *(CONFIG, "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", *TOKENIZER_FILES),
    *("chat_template.jinja", "chat_template.json", *PROCESSOR_FILES, "video_preprocessor_config.json"),
)
# The same weights once more, in the layout of their maker's own programs.
_SECOND_COPY = "consolidated*.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository as the hub lists it. `sha256` is known of large files alone."""

    name: str
    size: int
    sha256: str | None = None

    @property
    def is_weights(self) -> bool:
        """Whether it is fetched after what tells that the model is whole."""
        return self.name.endswith(".safetensors") or self.name.startswith(f"{EXPORT_FOLDER}/")


def chosen(files: Iterable[HubFile]) -> tuple[HubFile, ...]:
    """Those to fetch, by name."""
    allowed = [file for file in files if _is_allowed(file.name)]
    has_weights = any(file.name in (SINGLE_WEIGHTS, WEIGHTS_INDEX) for file in allowed)
    wanted = [file for file in allowed if not (has_weights and fnmatchcase(file.name, _SECOND_COPY))]
    return tuple(sorted(wanted, key=lambda file: file.name))


def missing(names: Collection[str], config: Mapping[str, Any] | None, index: Mapping[str, Any] | None) -> list[str]:
    """What a whole model would have besides the non-empty files `names`; `index` is that of its shards, if there is one."""
    lacking = [] if config is not None and CONFIG in names else [CONFIG]
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if not weights:
        lacking.append("safetensors weights (others are never loaded)")
    elif SINGLE_WEIGHTS not in names:
        lacking += _missing_shards(names, index)
    if not any(name in names for name in TOKENIZER_FILES) and not {"vocab.json", "merges.txt"} <= set(names):
        lacking.append("a tokenizer")
    towers = [name for name in ("vision_config", "audio_config") if (config or {}).get(name)]
    if towers and not any(name in names for name in PROCESSOR_FILES):
        lacking.append(f"a processor, which its {towers[0]} asks for")
    return lacking


def _missing_shards(names: Collection[str], index: Mapping[str, Any] | None) -> list[str]:
    if index is None:
        return [f"{SINGLE_WEIGHTS} or {WEIGHTS_INDEX}"]
    try:
        shards = sorted(set(shard_names(index, WEIGHTS_INDEX).values()))
    except BrokenCheckpoint as error:
        return [f"a sound {WEIGHTS_INDEX} ({error})"]
    return [f"the shard {shard}" for shard in shards if shard not in names]


def _is_allowed(name: str) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name or not name.isprintable():
        return False
    if any(part.startswith(".") for part in path.parts) or path.suffix.lower() in PICKLE_SUFFIXES:
        return False
    if len(path.parts) > 1:
        return path.parts[0] == EXPORT_FOLDER and path.suffix != ".py"
    return any(fnmatchcase(name, pattern) for pattern in _ALLOWED)
