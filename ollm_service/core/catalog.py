"""Which models are known by a short alias?"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ollm_service.core.plan import ModelModality, NativeFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model that we know by alias: where it comes from and what it can do."""

    alias: str
    repo_id: str
    family: NativeFamily
    modalities: tuple[ModelModality, ...] = (ModelModality.TEXT,)
    requires_processor: bool = False
    supports_disk_cache: bool = True


DEFAULT_MODEL = "llama3-1B-chat"

_ENTRIES = (
    CatalogEntry(alias=DEFAULT_MODEL, repo_id="unsloth/Llama-3.2-1B-Instruct", family=NativeFamily.LLAMA),
    CatalogEntry(alias="llama3-3B-chat", repo_id="unsloth/Llama-3.2-3B-Instruct", family=NativeFamily.LLAMA),
    CatalogEntry(alias="llama3-8B-chat", repo_id="unsloth/Meta-Llama-3.1-8B-Instruct", family=NativeFamily.LLAMA),
    CatalogEntry(
        alias="gpt-oss-20B",
        repo_id="AnuarSh/gpt-oss-20B",
        family=NativeFamily.GPT_OSS,
        supports_disk_cache=False,
    ),
    CatalogEntry(alias="qwen3-next-80B", repo_id="Qwen/Qwen3-Next-80B-A3B-Instruct", family=NativeFamily.QWEN3_NEXT),
    CatalogEntry(
        alias="gemma3-12B",
        repo_id="google/gemma-3-12b-it",
        family=NativeFamily.GEMMA3,
        modalities=(ModelModality.TEXT, ModelModality.IMAGE),
        requires_processor=True,
    ),
    CatalogEntry(
        alias="voxtral-small-24B",
        repo_id="mistralai/Voxtral-Small-24B-2507",
        family=NativeFamily.VOXTRAL,
        modalities=(ModelModality.TEXT, ModelModality.AUDIO),
        requires_processor=True,
    ),
)

CATALOG: Mapping[str, CatalogEntry] = MappingProxyType({entry.alias: entry for entry in _ENTRIES})


def entry_for_repo(repo_id: str) -> CatalogEntry | None:
    """The entry whose repository this is, if any."""
    return next((entry for entry in _ENTRIES if entry.repo_id == repo_id), None)
