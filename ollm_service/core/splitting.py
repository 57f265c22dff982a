"""Which rows of a job share a plan record? Rows that need far more memory than most have plans of their own.

A plan is placed for its longest row, so one long row among 255 short ones would make all of them wait for a machine that holds
it. The rule:

  1. A row's need is the bound of its tokens, prompt and output together, but never more than the model's context.
  2. Usual rows are those of up to `USUAL_FACTOR` times the median need, and all of up to `ALWAYS_USUAL_TOKENS`.
  3. Above that each factor of `USUAL_FACTOR` begins another group, so that long rows do not wait for very long ones either.
  4. Each group is cut into plans in the rows' order, the usual rows first.

It depends on the rows and the model alone, never on the fleet: the same submission is always split the same way.
"""

from collections.abc import Iterator, Sequence

USUAL_FACTOR = 4
ALWAYS_USUAL_TOKENS = 2048


def split(needs: Sequence[int], *, rows_per_plan: int) -> Iterator[tuple[int, ...]]:
    """The positions of each plan's rows. Every position is in exactly one plan, and each plan's are in ascending order."""
    for group in groups(needs):
        for start in range(0, len(group), rows_per_plan):
            yield tuple(group[start : start + rows_per_plan])


def groups(needs: Sequence[int]) -> list[list[int]]:
    """The positions of the rows of each group, the usual ones first. No group is empty."""
    if not needs:
        return []
    limit = max(ALWAYS_USUAL_TOKENS, USUAL_FACTOR * sorted(needs)[len(needs) // 2])
    if max(needs) <= limit:  # as in nearly every job
        return [list(range(len(needs)))]
    found: dict[int, list[int]] = {}
    for position, need in enumerate(needs):
        found.setdefault(_band(need, limit), []).append(position)
    return [found[band] for band in sorted(found)]


def _band(need: int, limit: int) -> int:
    """How often the limit must grow by the factor until it holds this need."""
    band = 0
    while need > limit:
        band, limit = band + 1, limit * USUAL_FACTOR
    return band
