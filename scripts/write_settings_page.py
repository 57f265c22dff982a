"""What does the page of settings say? It is written from the settings themselves: `python scripts/write_settings_page.py`."""

from pathlib import Path

from pydantic.fields import FieldInfo

from ollm_service.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEADER = """\
# Settings

Every process reads its settings once, at its start, from environment variables. A wrong value ends the process with status 2
and a sentence that names the variable. `ollm-service up` has options for the ones that matter on a single machine.

| Variable | Default | Meaning |
|---|---|---|
"""
FOOTER = """
A client, the command line included, reads two more: `OLLM_BASE_URL`, where the service is (`http://127.0.0.1:8000` unless set),
and `OLLM_API_KEY`, the key that it sends.

(This page is written by `scripts/write_settings_page.py`.)
"""


def page() -> str:
    """The whole page."""
    return HEADER + "".join(_row(name, field) for name, field in Settings.model_fields.items()) + FOOTER


def _row(name: str, field: FieldInfo) -> str:
    default = "" if field.default in (None, "") else f"`{field.default}`"
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `OLLM_{name.upper()}` | {default} | {meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
