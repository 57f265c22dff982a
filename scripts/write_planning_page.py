"""What do the tables of docs/planning.md say? They are written from the code: `python scripts/write_planning_page.py`.

Each stands between two comments that name it; everything else on the page is written by hand.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ollm_service.core.decisions import DECISIONS, Decision
from ollm_service.core.passes import PASS_TRAITS
from ollm_service.core.plan import NativeFamily, PassId
from ollm_service.core.providers import FAMILY_ARCHITECTURES, PASS_RULES, PROVIDERS, PassRule

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
_BLOCK = re.compile(r"(<!-- written: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The page with every table as the code has it now. Raises KeyError for a table that is not known."""
    blocks = tables()
    return _BLOCK.sub(lambda found: f"{found[1]}\n{blocks[found['name']]}\n{found[3]}", text)


def tables() -> Mapping[str, str]:
    """Each table by its name."""
    return {
        "decisions": _table(
            ("`backend`", "`use_specialization`", "Specialized", "Loadable", "Plan", "Reason"), map(_decision, DECISIONS)
        ),
        "providers": _table(
            ("Family", "Provider", "Architectures", "Passes, in order"),
            ((f"{one.family}", f"`{one.provider_id}`", _architectures(one.family), _passes(one.family)) for one in PROVIDERS),
        ),
        "passes": _table(("Pass", "What it does", "Planned", "Exact"), map(_pass, PASS_RULES)),
    }


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _decision(row: Decision) -> tuple[str, ...]:
    backend = row.backend if " " in row.backend or row.backend == "unknown" else f"`{row.backend}`"
    reason = re.sub(r"\{(\w+)\}", lambda found: f"*{found[1].replace('_', ' ')}*", row.reason)
    words = (
        _word(row.use_specialization, "true", "false"),
        *(_word(fact, "yes", "no") for fact in (row.is_specialized, row.is_loadable)),
    )
    return (backend, *words, row.outcome.value, reason)


def _word(fact: bool | None, yes: str, no: str) -> str:
    return "" if fact is None else yes if fact else no


def _architectures(family: NativeFamily) -> str:
    return ", ".join(FAMILY_ARCHITECTURES[family])


def _passes(family: NativeFamily) -> str:
    return ", ".join(f"`{rule.pass_id}`" for rule in PASS_RULES if family in rule.families)


def _pass(rule: PassRule) -> tuple[str, ...]:
    traits = PASS_TRAITS[PassId(rule.pass_id)]
    planned = (
        "for every family"
        if rule.families == frozenset(NativeFamily)
        else "for " + ", ".join(family for family in NativeFamily if family in rule.families)
    )
    return (
        f"`{rule.pass_id}`",
        traits.effect,
        f"{planned}{', ' if rule.words else ''}{rule.words}",
        "yes" if traits.exact else "no",
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
