"""Which backend does a plan get? The decision table: exactly one row fits any combination of what decides.

`docs/planning.md` prints it from here.
"""

from dataclasses import dataclass
from enum import StrEnum

from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import BackendId

NOT_SET = "not set"
UNKNOWN = "unknown"
BACKEND_CHOICES = (UNKNOWN, BackendId.OPTIMIZED_NATIVE.value, BackendId.TRANSFORMERS_GENERIC.value, NOT_SET)


class Outcome(StrEnum):
    """What becomes of a reference with its options."""

    INVALID = "refused (400)"
    NATIVE = "native"
    GENERIC = "generic"
    NOT_EXECUTABLE = "not executable (422)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One row. None in a condition leaves it open; the reason's braces are filled in from the model and the options.

    `is_specialized`: there is no adapter, no weights that a library has packed, and exactly one provider matches. `is_loadable`:
    the model's kind is known, or it can be downloaded and nobody has it yet.
    """

    backend: str
    use_specialization: bool | None = None
    is_specialized: bool | None = None
    is_loadable: bool | None = None
    outcome: Outcome
    reason: str

    def fits(self, backend: str, *, use_specialization: bool, is_specialized: bool, is_loadable: bool) -> bool:
        """Whether the row's conditions hold."""
        pairs = (
            (self.use_specialization, use_specialization),
            (self.is_specialized, is_specialized),
            (self.is_loadable, is_loadable),
        )
        return self.backend == backend and all(wanted in (None, found) for wanted, found in pairs)


_NATIVE, _GENERIC = BackendId.OPTIMIZED_NATIVE.value, BackendId.TRANSFORMERS_GENERIC.value

DECISIONS: tuple[Decision, ...] = (
    Decision(backend=UNKNOWN, outcome=Outcome.INVALID, reason="`{backend}` is not known."),
    Decision(
        backend=_NATIVE,
        use_specialization=False,
        outcome=Outcome.INVALID,
        reason="use_specialization: false contradicts backend `optimized-native`.",
    ),
    Decision(
        backend=_NATIVE,
        use_specialization=True,
        is_specialized=True,
        outcome=Outcome.NATIVE,
        reason="{provider} specializes the {family} family with {passes}; asked for.",
    ),
    Decision(
        backend=_NATIVE,
        use_specialization=True,
        is_specialized=False,
        outcome=Outcome.NOT_EXECUTABLE,
        reason="Backend `optimized-native` was asked for, but {why_not_native}.",
    ),
    Decision(
        backend=_GENERIC, is_loadable=True, outcome=Outcome.GENERIC, reason="transformers-generic {how_it_loads}: asked for."
    ),
    Decision(
        backend=_GENERIC,
        is_loadable=False,
        outcome=Outcome.NOT_EXECUTABLE,
        reason="Backend `transformers-generic` was asked for, but {why_not_generic}.",
    ),
    Decision(
        backend=NOT_SET,
        use_specialization=True,
        is_specialized=True,
        outcome=Outcome.NATIVE,
        reason="{provider} specializes the {family} family with {passes}.",
    ),
    Decision(
        backend=NOT_SET,
        use_specialization=True,
        is_specialized=False,
        is_loadable=True,
        outcome=Outcome.GENERIC,
        reason="transformers-generic {how_it_loads}: {why_not_native}.",
    ),
    Decision(
        backend=NOT_SET,
        use_specialization=True,
        is_specialized=False,
        is_loadable=False,
        outcome=Outcome.NOT_EXECUTABLE,
        reason="No backend runs it: {why_not_native}, and {why_not_generic}.",
    ),
    Decision(
        backend=NOT_SET,
        use_specialization=False,
        is_loadable=True,
        outcome=Outcome.GENERIC,
        reason="transformers-generic {how_it_loads}: specialization was switched off.",
    ),
    Decision(
        backend=NOT_SET,
        use_specialization=False,
        is_loadable=False,
        outcome=Outcome.NOT_EXECUTABLE,
        reason="Specialization was switched off, and {why_not_generic}.",
    ),
)


def decide(config: RuntimeConfig, *, is_specialized: bool, is_loadable: bool) -> Decision:
    """The row that fits. The first two never do: such options cannot be made."""
    backend = config.backend or NOT_SET
    return next(
        row
        for row in DECISIONS
        if row.fits(backend, use_specialization=config.use_specialization, is_specialized=is_specialized, is_loadable=is_loadable)
    )
