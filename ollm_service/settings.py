"""How is this process configured? One frozen Settings, read from `OLLM_*` and `ollm.toml` at entry points only."""

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ollm_service.configuration import PREFIX, read_file
from ollm_service.core.errors import MisconfiguredService
from ollm_service.core.labels import Attributes

MEMORY_BROKER = "memory://"
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)


class Settings(BaseSettings):
    """Everything that an operator may set; `docs/settings.md` is generated from it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    data_dir: Path = Field(Path("ollm-data"), description="Folder for the embedded database, KV files and lock files.")
    database_url: str = Field(
        "",
        description="SQLAlchemy URL, `postgresql+psycopg://user:password@host/name` for a fleet; "
        "unset: SQLite in the data folder.",
    )
    broker_url: str = Field(MEMORY_BROKER, description="`redis://` or `amqp://` URL for hints; `memory://`: polling only.")
    models_dir: Path = Field(Path("models"), description="Folder whose subfolders are models (worker).")
    cache_dir: Path | None = Field(
        None,
        description="Folder for KV files, and for weights that are read while a model runs (worker); "
        "unset: `kv` in the data folder.",
    )
    node: str = Field("", description="Stable name of this machine (worker); unset: the host name.")
    worker_labels: str = Field("", description="Labels of this worker, such as `zone=home,rack=2`; numbers compare as numbers.")
    allow_downloads: bool = Field(False, description="Whether this worker may fetch models from the hub, with its `HF_TOKEN`.")
    download_repos: str = Field(
        "", description="The only repositories that it may fetch, such as `unsloth/*,org/name`; unset: any (worker)."
    )
    memory_limit_gb: float = Field(
        0.0,
        ge=0,
        description="Host memory that this worker's runners may take together, in GiB (worker); 0: whatever is free. "
        "A model that needs more is read from disk as it runs.",
    )
    slots: int = Field(1, ge=1, le=64, description="Plans that this worker runs at a time, each in a runner of its own.")
    lease_seconds: float = Field(
        30.0, ge=1, le=3600, description="How long a worker may be silent before its plans are requeued."
    )
    stall_seconds: float = Field(600.0, ge=1, description="How long a runner may make no progress before it is killed (worker).")
    drain_seconds: float = Field(60.0, ge=0, description="How long a stopping worker finishes its plans before it releases them.")
    runner_command: str = Field("", description="Command that starts a runner (worker), for runners other than ours.")
    host: str = Field("127.0.0.1", description="Address that the coordinator listens on; others than loopback need API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port that the coordinator listens on; 0: any free port.")
    api_keys: str = Field("", description="Comma-separated API keys that the coordinator accepts; only their hashes are kept.")
    max_body_bytes: int = Field(
        256 * 1024**2, ge=1024, description="Largest request body that the coordinator accepts, in bytes."
    )

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _unset(cls, value: Any) -> Any:
        return value or None

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the environment, and beneath it `ollm.toml`; an override that is not None wins over both.

        Raises MisconfiguredService naming the variable, or the file and its key, and the problem.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        file = read_file(os.environ)
        above = given.keys() | {variable.lower().removeprefix(PREFIX.lower()) for variable in os.environ}
        below = {name: value for name, value in file.service.items() if name not in above}
        try:
            return cls(**below, **given)
        except ValidationError as error:
            problems = "; ".join(f"{_place(str(item['loc'][0]), below, file.name)}: {item['msg']}" for item in error.errors())
            raise MisconfiguredService(f"Settings are wrong: {problems}.") from error

    @property
    def effective_database_url(self) -> str:
        """The database URL, SQLite in the data folder where none is set."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'ollm.db').absolute()}"

    @property
    def effective_cache_dir(self) -> Path:
        """The folder for KV files."""
        return (self.cache_dir or self.data_dir / "kv").absolute()

    @property
    def memory_limit_bytes(self) -> int | None:
        """What the runners of this worker may take of host memory together; None: no limit of ours."""
        return int(self.memory_limit_gb * 1024**3) or None

    @property
    def effective_node(self) -> str:
        """The name of this machine."""
        return self.node or socket.gethostname()

    @property
    def downloadable(self) -> tuple[str, ...]:
        """The patterns of the repositories that this worker may fetch; none: any."""
        return tuple(filter(None, (pattern.strip() for pattern in self.download_repos.split(","))))

    @property
    def labels(self) -> Attributes:
        """The worker labels as a map. Raises MisconfiguredService for an entry without `=`."""
        labels: dict[str, str | float] = {}
        for entry in filter(None, (part.strip() for part in self.worker_labels.split(","))):
            name, equals, value = entry.partition("=")
            if not equals or not name.strip():
                raise MisconfiguredService(f"OLLM_WORKER_LABELS: `{entry}` is not name=value.")
            labels[name.strip()] = _number_or_text(value.strip())
        return labels


def _place(name: str, from_file: Mapping[str, Any], file: str) -> str:
    return f"{file}, {name}" if name in from_file else f"{PREFIX}{name.upper()}"


def _number_or_text(value: str) -> str | float:
    # Python's float() would also take `nan`, `inf` and `1_000`, which an operator means as texts and JSON cannot hold.
    return float(value) if _NUMBER.fullmatch(value) else value
