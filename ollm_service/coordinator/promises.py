"""Would a submission run what its preview has shown? If not, what has changed?"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from ollm_service.coordinator.drafting import Draft
from ollm_service.core.errors import PlanChanged
from ollm_service.store.quotes import StoredPreview


def check_unchanged(stored: StoredPreview, drafted: Draft, rows: Sequence[Any]) -> None:
    """Raises PlanChanged, saying what has, where a submission would not run what was previewed."""
    changed = []
    if stored.request.get("rows_digest") not in (None, rows_digest(rows)):
        changed.append("the rows")
    before, now = stored.planned.as_dict(), drafted.planned.plan.as_dict()
    changed += [f"{name} (was {_short(before[name])}, is {_short(now[name])})" for name in before if before[name] != now[name]]
    needs = drafted.requirements.as_dict() if drafted.requirements else {}
    changed += [
        f"required {name} (was {_short(value)}, is {_short(needs.get(name))})"
        for name, value in stored.requirements.as_dict().items()
        if value != needs.get(name)
    ]
    if changed:
        raise PlanChanged(
            f"This is not what {stored.preview_id} showed any more; changed: {'; '.join(changed)}.",
            param="plan",
            remedy="Look at a new preview, or submit without naming one.",
        )


def rows_digest(rows: Iterable[Any]) -> str:
    """The sha256 over the rows as given, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}…"
