"""Does a small protocol keep its promises under every interleaving? A breadth-first explorer with safety and liveness.

Safety is judged on every transition. Liveness: without any more faults or wishes, every weakly fair run ends in a done
state. A run is weakly fair when no fair action (an actor and a verb) stays enabled for ever without being taken. Only a
set of states that can all reach each other can hold a run for ever, and it holds a fair one exactly if each fair action
is somewhere disabled in the set or taken inside it. The largest such sets are the strongly connected components, so
looking at those is exact.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)


class Step(NamedTuple):
    """One atomic step out of a state. `wrong` says which promise the step itself breaks."""

    actor: str
    verb: str
    target: Hashable
    kind: Literal["fair", "fault", "wish"] = "fair"
    note: str = ""
    wrong: str | None = None

    def __str__(self) -> str:
        return f"{self.actor} {self.verb}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What exploring found: how many states, and the first broken promise with a shortest way to it."""

    states: int
    violation: str | None = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        story = "\n  ".join((self.violation or "holds", *self.trace))
        return f"{self.states} states: {story}"


class Explorer(Generic[S]):
    """Explores from `start`; `judge(before, step)` names a broken promise or None; `is_done` marks where runs should end."""

    def __init__(
        self,
        start: S,
        steps: Callable[[S], Iterable[Step]],
        *,
        judge: Callable[[S, Step], str | None],
        is_done: Callable[[S], bool],
    ) -> None:
        self._steps, self._judge, self._is_done = steps, judge, is_done
        self._number: dict[Hashable, int] = {start: 0}
        self._states: list[S] = [start]
        self._came_by: list[tuple[int, str] | None] = [None]
        self._fair: list[list[tuple[tuple[str, str], int]]] = []

    def run(self) -> Verdict:
        """Explore everything, or up to the first violation."""
        for here, state in enumerate(self._states):  # the list grows while we walk it, which makes it breadth-first
            self._fair.append([])
            done = self._is_done(state)
            for step in self._steps(state):
                if problem := step.wrong or self._judge(state, step):
                    return self._violated(problem, here, str(step))
                there = self._visit(step, here)
                if step.kind == "fair" and there != here and not done:
                    self._fair[here].append(((step.actor, step.verb), there))
            if not done and not self._fair[here]:
                return self._violated("stuck: nothing but a fault or a wish moves it", here)
        for component in self._components():
            if turns := self._holds_fair_run(component):
                return self._violated(f"livelock of {', '.join(sorted(turns))}", min(component))
        return Verdict(states=len(self._states))

    def _visit(self, step: Step, here: int) -> int:
        there = self._number.setdefault(step.target, len(self._states))
        if there == len(self._states):
            self._states.append(step.target)  # type: ignore[arg-type]  # Step is not generic: NamedTuples with slots are faster
            self._came_by.append((here, str(step)))
        return there

    def _violated(self, problem: str, state: int, *last: str) -> Verdict:
        trace = list(last)
        while (origin := self._came_by[state]) is not None:
            state, label = origin
            trace.insert(0, label)
        return Verdict(states=len(self._states), violation=problem, trace=tuple(trace))

    def _holds_fair_run(self, component: list[int]) -> set[str]:
        """The verbs that turn for ever inside, or nothing when fairness forces every run out."""
        if len(component) == 1:
            return set()
        inside = set(component)
        always = set.intersection(*({action for action, _ in self._fair[state]} for state in component))
        turning = {action for state in component for action, there in self._fair[state] if there in inside}
        return {verb for _, verb in turning} if always <= turning else set()

    def _components(self) -> Iterator[list[int]]:
        """Strongly connected components of the fair steps (Tarjan's algorithm, with a stack of our own)."""
        index: dict[int, int] = {}
        low: dict[int, int] = {}
        open_states: list[int] = []
        is_open: set[int] = set()
        for root in range(len(self._states)):
            calls = [] if root in index else [(root, iter(self._fair[root]))]
            while calls:
                state, edges = calls[-1]
                if state not in index:
                    index[state] = low[state] = len(index)
                    open_states.append(state)
                    is_open.add(state)
                for _, there in edges:
                    if there not in index:
                        calls.append((there, iter(self._fair[there])))
                        break
                    if there in is_open:
                        low[state] = min(low[state], index[there])
                else:
                    calls.pop()
                    if calls:
                        low[calls[-1][0]] = min(low[calls[-1][0]], low[state])
                    if low[state] == index[state]:
                        cut = _last_index(open_states, state)
                        component = open_states[cut:]
                        del open_states[cut:]
                        is_open.difference_update(component)
                        yield component


def _last_index(items: list[int], item: int) -> int:
    position = len(items) - 1
    while items[position] != item:
        position -= 1
    return position
