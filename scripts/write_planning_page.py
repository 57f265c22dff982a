"""What of docs/planning.md is made? Tables from the code, and examples that are run: `make pages`."""

from pathlib import Path

from scripts.planning_examples import examples
from scripts.planning_tables import filled, tables

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"


def page(text: str) -> str:
    """The page with everything that is made."""
    return filled(text, {**tables(), "examples": examples()})


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
