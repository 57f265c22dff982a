"""What does the page of settings say? It is written from the settings themselves: `python scripts/write_settings_page.py`."""

import json
from dataclasses import fields
from pathlib import Path

from pydantic.fields import FieldInfo

from ollm_service.cli.options import HELP
from ollm_service.configuration import PREFIX
from ollm_service.core.precedence import SECTIONS
from ollm_service.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEADER = """\
# Settings

Every process reads its settings once, at its start: from environment variables, and beneath them from a file. A wrong one ends
the process with status 2 and a sentence that names the variable, or the file and the key. `ollm-service up` has options for the
ones that matter on a single machine.

## The file

`ollm.toml` in the working directory is read if it is there; `OLLM_CONFIG_FILE` names another one, which then must be there. Its
keys are the settings of the service, in lower case and without `OLLM_`, and its tables `[runtime]` and `[generation]` the options
of jobs. A key that means nothing is refused, with what is allowed.

```toml
models_dir = "/srv/models"

[runtime]
strategy_selector_profile = "capacity"

[generation]
max_new_tokens = 200
stop = ["\\n\\n"]
```

## The service

| Variable | Default | Meaning |
|---|---|---|
"""
CLIENT = """
A client, the command line included, reads two more: `OLLM_BASE_URL`, where the service is (`http://127.0.0.1:8000` unless set),
and `OLLM_API_KEY`, the key that it sends.

## How a model runs and how it generates

What counts is, for each option by itself, what is said first in this order:

1. the request: a flag of the command line, an argument of the client, a field of the HTTP body;
2. the environment of the client: `OLLM_RUNTIME__DEVICE`, `OLLM_GENERATION__TOP_K`;
3. the file of the client: `device` in `[runtime]`;
4. the environment, then the file, of the server;
5. the default.

Client and server each resolve their part before a job is stored, and what came of it is stored with the job. Workers never read
these options from their own machine. A row's own `generation` wins over all of this, for that row.

`default` (and in JSON `null`) goes back to the default, whatever is said further down: `--device default` asks for no device
though the environment names one. For `stop`, which may be any text, that is the empty list, or `--stop ""`. A RuntimeConfig or
GenerationConfig in Python says what differs from the default; a mapping says whatever it holds. In the environment, truth is
`true` or `false`, several stop strings are a JSON list, and an empty variable says nothing.
"""
OPTIONS_HEADER = """
| `[{section}]` | Variable | Default | Meaning |
|---|---|---|---|
"""
FOOTER = """
(This page is written by `scripts/write_settings_page.py`.)
"""


def page() -> str:
    """The whole page."""
    settings = "".join(_row(name, field) for name, field in Settings.model_fields.items())
    return HEADER + settings + CLIENT + "".join(_options(section) for section in SECTIONS) + FOOTER


def _options(section: str) -> str:
    rows = (_option(section, item.name, item.default) for item in fields(SECTIONS[section]))
    return OPTIONS_HEADER.format(section=section) + "".join(rows)


def _option(section: str, name: str, default: object) -> str:
    text = default if isinstance(default, str) else json.dumps(default)
    shown = "" if default in (None, ()) else f"`{text}`"
    return f"| `{name}` | `{PREFIX}{section.upper()}__{name.upper()}` | {shown} | {HELP[name]} |\n"


def _row(name: str, field: FieldInfo) -> str:
    default = "" if field.default in (None, "") else f"`{field.default}`"
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{PREFIX}{name.upper()}` | {default} | {meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
