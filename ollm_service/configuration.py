"""What do this machine's environment and its `ollm.toml` say? Read by entry points, once; judged in `core/precedence.py`.

`OLLM_RUNTIME__<FIELD>` and `OLLM_GENERATION__<FIELD>` are options in the environment, the tables `[runtime]` and `[generation]`
those of the file. The file's other keys are the settings of the service, named as their variables without `OLLM_`, in lower case.
The file is the one that `OLLM_CONFIG_FILE` names, else `ollm.toml` in the working directory, if there is one.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ollm_service.core.errors import MisconfiguredService, shown
from ollm_service.core.precedence import SECTIONS, OptionLayers, check_together, from_texts, layer_of

FILE_VARIABLE = "OLLM_CONFIG_FILE"
FILE_NAME = "ollm.toml"
PREFIX = "OLLM_"
# The fields of Settings, which a client, who has no need of it, does not load.
SERVICE_KEYS = (
    *("data_dir", "database_url", "broker_url", "models_dir", "cache_dir", "node", "worker_labels", "slots", "lease_seconds"),
    *("allow_downloads", "download_repos", "memory_limit_gb"),
    *("stall_seconds", "drain_seconds", "runner_command", "host", "port", "api_keys", "max_body_bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """The file's content, its keys checked; empty where there is none. `name` is what messages call it."""

    name: str = FILE_NAME
    service: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_file(environment: Mapping[str, str], folder: Path = Path()) -> ConfigFile:
    """The file. Raises MisconfiguredService for one that was named and is not there, that is no TOML or has unknown keys."""
    named = environment.get(FILE_VARIABLE, "")
    name = named or FILE_NAME
    try:
        content = tomllib.loads((folder / name).read_bytes().decode())
    except FileNotFoundError as error:
        if not named:
            return ConfigFile()
        raise MisconfiguredService(f"{FILE_VARIABLE} names {named}, which does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
        why = f"is not TOML: {error}" if isinstance(error, ValueError) else f"cannot be read: {error}"
        raise MisconfiguredService(f"The settings file {name} {why}.") from error
    for key, value in content.items():
        if key not in SECTIONS and key not in SERVICE_KEYS:
            allowed = ", ".join((*SERVICE_KEYS, *(f"[{section}]" for section in SECTIONS)))
            raise MisconfiguredService(f"{name}: `{shown(key)}` is not a setting. Allowed: {allowed}.")
        if key in SECTIONS and not isinstance(value, dict):
            raise MisconfiguredService(f"{name}: `{key}` must be a table, [{key}].")
    return ConfigFile(
        name=name,
        service={key: value for key, value in content.items() if key not in SECTIONS},
        options={key: value for key, value in content.items() if key in SECTIONS},
    )


def read_options(environment: Mapping[str, str], folder: Path = Path(), *, owner: str = "") -> OptionLayers:
    """What this machine says about options; `owner`, such as `the server's`, goes before the name of each place in messages.

    Raises MisconfiguredService for what `read_file` refuses, for a variable or a key that is no option, for a value that is none
    of its option's, and where all of them together contradict each other.
    """
    file = read_file(environment, folder)
    variables = _option_variables(environment)
    before = f"{owner} " if owner else ""
    layers = {
        section: (
            layer_of(section, from_texts(section, variables[section]), partial(_variable, before, section)),
            layer_of(section, file.options.get(section, {}), partial(_key, f"{before}{file.name}", section)),
        )
        for section in SECTIONS
    }
    return check_together(OptionLayers(**layers))


def _variable(before: str, section: str, name: str) -> str:
    return f"{before}{PREFIX}{section.upper()}__{name.upper()}"


def _key(file: str, section: str, name: str) -> str:
    return f"{file}, [{section}] {name}"


def _option_variables(environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The texts of each section's variables by the option. Raises MisconfiguredService for a section that there is not."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for variable, text in environment.items():
        section, two, name = variable.upper().removeprefix(PREFIX).lower().partition("__")
        if not variable.upper().startswith(PREFIX) or not two:
            continue
        if section not in found:
            allowed = ", ".join(f"{PREFIX}{known.upper()}__" for known in SECTIONS)
            raise MisconfiguredService(f"{shown(variable)} is not a setting. With two underscores there are: {allowed}….")
        found[section][name] = text
    return found
