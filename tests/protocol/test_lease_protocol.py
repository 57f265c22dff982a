"""Does the lease protocol hold under every interleaving, and does each of its guards matter?

The first tests explore the protocol as it is, each in a world with other faults. Every mutant then weakens one rule, in a
world that is just rich enough to show why the rule is there, and must be caught with the violation that it should cause.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.protocol.lease_model import World, verdict_of


def world(faults: str = "", budget: int = 0, **more: Any) -> World:
    """A world whose faults are written as a comma-separated list."""
    return World(faults=frozenset(filter(None, faults.split(", "))), budget=budget, **more)


ONE_EACH = (".", ".")
FIRST, BOTH = frozenset({0}), frozenset({0, 1})

HOLDS = {
    "kills, freezes, drains, lost replies, cancels, deadlines": world(
        "kill, freeze, drain, lost reply", 3, cancels=True, deadlines=True
    ),
    "runner crashes, hangs and failures of both kinds": world("crash, hang, transient, permanent, kill", 4),
    "attempt numbers": world("kill, freeze, lost reply", 3, cancels=True, counts_attempts=True),
    "a broker that loses and doubles hints": world("kill, broker, lost reply", 3, hints=True),
    "hints and sweep without any poll": world("kill, broker", 3, hints=True),
    "two plans": world("kill, lost reply, freeze", 2, plans=ONE_EACH),
    "a node that is always full": world("kill, freeze, lost reply", 3, full=FIRST, cancels=True),
    "every fault of a process, a cancel": world("kill, freeze, drain, lost reply, crash, transient", 2, cancels=True),
    "a node that can never load": world(broken=FIRST, harmless=True),
    "no node can load": world("kill, lost reply", 2, broken=BOTH),
    "a transient failure beside a full node": world("transient", 1, full=FIRST, harmless=True),
    "a poison row": world(poison=FIRST, harmless=True),
    "a poison row in the middle of three, and kills": world("kill, lost reply", 2, plans=("...",), poison=frozenset({1})),
    "a poison row that kills its whole worker, beside a full node": world(poison=FIRST, poison_kills_worker=True, full=FIRST),
    "rows invalid by themselves": world("kill", 1, invalid_rows=True),
    "an inventory that changes": world("inventory, drain, kill, lost reply", 3),
    "lost replies alone never cost a row": world("lost reply", 4, harmless=True),
    "a failover that loses the newest commit": world("failover, kill, freeze, crash", 3),
}


@pytest.mark.parametrize("name", HOLDS)
def test_the_protocol_holds(name: str) -> None:
    """Under these faults no promise is broken, and every fair run ends with all plans final."""
    verdict = verdict_of(HOLDS[name], polls="without any poll" not in name)
    assert verdict.violation is None, str(verdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A weakened rule, the world that shows it, and the violation that follows."""

    expect: str
    world: World
    flips: dict[str, Any] = field(default_factory=dict)


MUTANTS = {
    "guard by state only": Mutant(
        flips={"guard": "state"},
        world=world("freeze", 1),
        expect="accepted from a worker that does not hold the lease",
    ),
    "guard by lease only, kept by final states": Mutant(
        flips={"guard": "lease", "final_keeps_lease": True},
        world=world(deadlines=True),
        expect="accepted from a worker that does not hold the lease",
    ),
    "guard by attempt number, with a failover": Mutant(
        flips={"guard": "attempt"},
        world=world("failover, freeze, kill", 3, counts_attempts=True),
        expect="accepted from a worker that does not hold the lease",
    ),
    "release gives its attempt number back": Mutant(
        flips={"attempts_only_grow": False},
        world=world("drain", 1, counts_attempts=True),
        expect="an attempt number was used again",
    ),
    "release ignores the cancel flag": Mutant(flips={"release_heeds_cancel": False}, world=world(cancels=True), expect="stuck"),
    "fail ignores the cancel flag": Mutant(
        flips={"fail_heeds_cancel": False}, world=world("transient", 1, cancels=True), expect="stuck"
    ),
    "reap ignores the cancel flag": Mutant(
        flips={"reap_heeds_cancel": False}, world=world("kill", 1, cancels=True), expect="stuck"
    ),
    "cancel in two statements": Mutant(
        flips={"cancel_is_one_statement": False},
        world=world("drain", 1, cancels=True),
        expect="claimed after an acknowledged cancel",
    ),
    "cancel in two statements, claim ignores the flag": Mutant(
        flips={"cancel_is_one_statement": False, "claim_heeds_cancel": False},
        world=world("drain", 1, cancels=True),
        expect="claimed after an acknowledged cancel",
    ),
    "no primary key on results": Mutant(
        flips={"one_result_a_row": False}, world=world("lost reply", 1), expect="a row has two results"
    ),
    "counts add the rows sent": Mutant(
        flips={"counts_add": "rows sent"}, world=world("lost reply", 1), expect="the stored counts are not the rows"
    ),
    "record, then a separate finish": Mutant(
        flips={"last_record_finishes": False}, world=world("kill", 1), expect="an answered plan is queued"
    ),
    "losses counted although rows were recorded": Mutant(
        flips={"losses_reset": "never"}, world=world("kill", 3), expect="dead although a row was recorded"
    ),
    "losses forgotten at a release": Mutant(
        flips={"losses_reset": "also by a release"},
        world=world(poison=FIRST, poison_kills_worker=True, full=FIRST),
        expect="livelock",
    ),
    "declines not persisted": Mutant(flips={"decline_is_kept": False}, world=world(full=FIRST), expect="livelock"),
    "decline written outside its release": Mutant(
        flips={"decline_is_part_of_release": False},
        world=world("freeze, kill", 2, full=FIRST),
        expect="a decline was accepted from a worker without the lease",
    ),
    "decline ends before the others polled": Mutant(
        flips={"decline_outlasts_polls": False}, world=world(full=FIRST), expect="livelock"
    ),
    "renew by worker id": Mutant(flips={"renewal_names": "worker"}, world=world("freeze", 1), expect="livelock|stuck"),
    "start is not idempotent": Mutant(
        flips={"start_is_idempotent": False},
        world=world("lost reply", 3, harmless=True),
        expect="a row that nothing is wrong with got an error",
    ),
    "a claim whose reply was lost is forgotten": Mutant(
        flips={"lost_claim_is_looked_up": False},
        world=world("lost reply", 3, harmless=True),
        expect="a row that nothing is wrong with got an error",
    ),
    "a crash is not remembered": Mutant(flips={"crash_is_remembered": False}, world=world(poison=FIRST), expect="livelock"),
    "a hang goes unnoticed": Mutant(flips={"hang_is_noticed": False}, world=world("hang", 1), expect="stuck"),
    "failures without a cap": Mutant(flips={"cap_counts": "nothing"}, world=world(broken=BOTH), expect="livelock"),
    "attempts capped instead of failures": Mutant(
        flips={"cap_counts": "attempts"},
        world=world("transient, drain", 3, counts_attempts=True, full=FIRST, harmless=True),
        expect="a row that nothing is wrong with got an error",
    ),
    "a failed node may claim again at once": Mutant(
        flips={"failure_excludes_node": False},
        world=world(broken=FIRST, harmless=True),
        expect="a row that nothing is wrong with got an error",
    ),
    "replan only when the inventory changes": Mutant(
        flips={"replans": "once"}, world=world("inventory, drain", 2), expect="stuck"
    ),
    "a plan whose rows are all invalid is queued": Mutant(
        flips={"answered_plan_is_born_final": False},
        world=world(invalid_rows=True),
        expect="an answered plan is queued|final state",
    ),
    "neither poll nor sweep": Mutant(
        flips={"polls": False, "sweeps": False}, world=world("broker", 1, hints=True), expect="stuck"
    ),
    "every node declines for ever (by design: shown as declined-everywhere)": Mutant(world=world(full=BOTH), expect="livelock"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_weakened_rule_is_caught(name: str) -> None:
    """Each simplification breaks a promise, and the explorer shows the way there."""
    mutant = MUTANTS[name]
    verdict = verdict_of(mutant.world, **mutant.flips)
    assert verdict.violation is not None, f"{name}: survived, {verdict}"
    assert any(part in verdict.violation for part in mutant.expect.split("|")), str(verdict)
