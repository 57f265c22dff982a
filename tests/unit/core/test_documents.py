"""Do the pages about planning, decisions and words say what the code does?"""

import re
import tomllib
from pathlib import Path

import pytest

from ollm_service.core import kv_selector
from ollm_service.core.options import KVCacheStrategy
from scripts.planning_tables import filled, tables

ROOT = Path(__file__).parents[3]
PLANNING = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
OURS = [ROOT / "CHANGELOG.md", ROOT / "docs" / "glossary.md", ROOT / "docs" / "planning.md", *(ROOT / "docs" / "adr").iterdir()]


def test_the_selectors_table_has_the_selectors_rules_in_their_order() -> None:
    """The page lists every rule of the code, in the order in which the code asks."""
    source = Path(kv_selector.__file__).read_text(encoding="utf-8")
    in_code = [rule for rule in dict.fromkeys(re.findall(r'"([a-z]+(?:-[a-z]+)+)"', source)) if rule != "bounded-window"]
    table = PLANNING.partition("the first rule that holds:")[2]
    in_page = re.findall(r"^\| `([a-z-]+)` \| .* \| (?:that one|[a-z-]+) \|$", table, re.MULTILINE)
    assert in_page == in_code
    strategies = set(re.findall(r"^\| `[a-z-]+` \| .* \| ([a-z-]+) \|$", table, re.MULTILINE))
    assert strategies == {strategy.value for strategy in KVCacheStrategy}


def test_the_planning_page_is_the_codes() -> None:
    """The decision table, the providers and the passes on the page are those of the code; `make pages` writes them."""
    assert filled(PLANNING, tables()) == PLANNING
    for name, table in tables().items():
        assert f"<!-- written: {name} -->\n\n{table}" in PLANNING


def test_every_dependency_has_its_reason() -> None:
    """A dependency that is added must be justified where the others are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(item for items in project["optional-dependencies"].values() for item in items)]
    names = {re.split(r"[\[<>=~ ]", item)[0] for item in wanted} - {project["name"]}
    reasons = (ROOT / "docs" / "adr" / "0006-dependencies.md").read_text(encoding="utf-8")
    assert not {name for name in names if not re.search(rf"\b{re.escape(name)}\b", reasons)}


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "adr").iterdir()), ids=lambda path: path.name)
def test_a_decision_record_has_its_three_parts_on_one_page(path: Path) -> None:
    """Context, decision and price, under a numbered title, in at most sixty lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"# {path.name[:4]}: ")
    assert [line for line in lines if line.startswith("## ")] == ["## Context", "## Decision", "## Price"]
    assert len(lines) <= 60


def test_decision_records_are_numbered_without_gaps() -> None:
    """A record is superseded by a new one, never taken away."""
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs" / "adr").iterdir())
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(path: Path) -> None:
    """A path in backquotes or a link leads somewhere."""
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:core|docs|tests|ollm_service|workers)/[\w./-]+)`", text):
        assert any((base / name).exists() for base in (ROOT, ROOT / "ollm_service")), name
