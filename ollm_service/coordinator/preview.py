"""What would run where, and why? The answer to a submission that nobody has made yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollm_service.coordinator.drafting import Draft, draft
from ollm_service.coordinator.fleet import Verdict, verdicts
from ollm_service.coordinator.rows import check_rows
from ollm_service.coordinator.service import Service
from ollm_service.coordinator.submission import ROWS_PER_PLAN
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.store.jobs import NewRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A draft, what each worker says to it, and the checked rows where some were given."""

    draft: Draft
    verdicts: tuple[Verdict, ...]
    rows: Sequence[NewRow] | None

    @property
    def plans_total(self) -> int:
        """How many plan records the rows would become."""
        return -(-len(self.rows or ()) // ROWS_PER_PLAN)


def preview(
    service: Service,
    model: str,
    runtime: Mapping[str, Any],
    generation: Mapping[str, Any],
    where: str | None,
    rows: Sequence[Any] | None,
) -> Preview:
    """Judge and plan as a submission would, and store nothing.

    Raises what a submission raises, but shows a plan that is not executable, with its reason.
    """
    config = RuntimeConfig.from_dict(runtime)
    settings = GenerationConfig.from_dict(generation)
    checked = None if rows is None else check_rows(rows, settings)
    drafted = draft(service.fleet.snapshot(), model, config, where)
    found = () if drafted.requirements is None else verdicts(drafted.requirements, drafted.fleet.workers)
    return Preview(draft=drafted, verdicts=found, rows=checked)
