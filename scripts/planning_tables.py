"""What do the tables of docs/planning.md say? The code's own: each stands between two comments that name it."""

import re
from collections.abc import Iterable, Mapping, Sequence

from ollm_service.core.decisions import DECISIONS, Decision
from ollm_service.core.passes import PASS_TRAITS
from ollm_service.core.plan import NativeFamily, PassId
from ollm_service.core.providers import FAMILY_ARCHITECTURES, PASS_RULES, PROVIDERS, PassRule

_BLOCK = re.compile(r"(<!-- written: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """The page with these blocks as they are now; others stay as they stand."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n{blocks[found['name']]}\n{found[3]}" if found["name"] in blocks else found[0]

    return _BLOCK.sub(block, text)


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
