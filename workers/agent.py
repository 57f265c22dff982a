"""How does a worker stay known, find work and leave? The torch-free agent: one thread registers, renews, discovers and claims.

Heartbeats, renewals and idle claims share that thread and the same store, so a worker that cannot claim cannot look alive for
long. Plans run in slots, each in the thread that claimed it: one of Celery's for a hint, one of ours for the idle poll. After a
plan the slot takes the next best one, until there is none.
"""

import contextlib
import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from ollm_service.core.capabilities import Capabilities
from ollm_service.core.errors import DatabaseUnavailable
from ollm_service.core.leasing import Assignment, lease_ms_in
from ollm_service.core.matching import Match, match
from ollm_service.core.retry import Failure
from ollm_service.store.database import Store
from workers.attempt import Attempt, Ending, Patience, Surroundings
from workers.downloads import Downloader
from workers.hints import Hints
from workers.inventory import Inventory
from workers.lease import Lease, boot_clock
from workers.model_shelf import ModelShelf
from workers.schedule import Schedule
from workers.slots import Slot, Slots

FIRST_SCAN_SECONDS = 2.0
TOKEN_SECONDS = 0.05  # between two looks at whether the store has changed, where it tells
LISTEN_SECONDS = 0.25
AWAY_SECONDS = 1.0  # between tries while the database is away
GUARD_SECONDS = 0.25
MOST_BROKEN_ROUNDS = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the operator decided about this worker."""

    models_dir: Path
    drain_seconds: float
    patience: Patience


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Where this worker's models come from: what lies in its models root, and what is fetched into it."""

    shelf: ModelShelf
    downloader: Downloader


class _Word(Enum):
    WAKE = auto()
    FREE = auto()
    DRAIN = auto()
    STOP = auto()


class Agent:
    """One worker. `start`, then `drain` or `stop_now` (both may be called by a signal handler), then `wait`.

    `on_end(code)` is called once from the agent's thread when the worker should leave by itself: drained on request of the
    operator (0) or broken (1).
    """

    def __init__(
        self,
        worker_id: str,
        store: Store,
        inventory: Inventory,
        models: Models,
        slots: Slots,
        terms: Terms,
        *,
        hints: Hints | None = None,
        on_end: Callable[[int], None] | None = None,
    ) -> None:
        self.worker_id = worker_id
        self._store = store
        self._inventory = inventory
        self._shelf = models.shelf
        self._downloader = models.downloader
        self._slots = slots
        self._terms = terms
        self._hints = hints
        self._on_end = on_end
        self._clock = boot_clock
        self._lease_ms = store.lease_ms  # what is asked for: more in a large fleet
        self._schedule = Schedule(self._clock())
        self._mailbox: queue.SimpleQueue[_Word] = queue.SimpleQueue()  # put() is safe in signal handlers
        self._ended = threading.Event()
        self._leases: dict[str, tuple[Lease, Slot]] = {}
        self._leases_lock = threading.Lock()
        self._capabilities: Capabilities | None = None
        self._seen: object = None  # the models and the devices' speed as of the last look
        self._classes: frozenset[str] = frozenset()
        self._models_of: dict[str, str | None] = {}  # the digest that each class names
        self._seen_seq = 0
        self._drain_at: float | None = None
        self._must_hurry = False
        self._broken_rounds = 0
        self._well_since: set[str] = set()
        self._is_away = False
        self._tells_changes = store.change_token() != 0
        self._threads = ThreadPoolExecutor(max_workers=len(slots.all), thread_name_prefix="slot")
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)
        self._guard = threading.Thread(target=self._guard_leases, name="guard", daemon=True)
        self._surroundings = Surroundings(
            leases=store.leases,
            models_dir=terms.models_dir,
            capabilities=self._known_capabilities,
            live=inventory.free_to,
            clock=self._clock,
            must_release=lambda: self._must_hurry or (self._drain_at is not None and self._clock() >= self._drain_at),
            must_hurry=lambda: self._must_hurry,
            patience=terms.patience,
        )

    # --- from outside

    def start(self) -> None:
        """Look at the machine, register, and begin; runners load their libraries meanwhile. Raises DatabaseUnavailable."""
        self._shelf.start()
        for slot in self._slots.all:
            with contextlib.suppress(OSError):  # told by the first plan that needs it
                slot.ready_runner()
        self._shelf.wait_for_first_scan(FIRST_SCAN_SECONDS)
        self._register()
        self._guard.start()
        self._thread.start()
        self._downloader.start(self._known_capabilities)
        capabilities = self._known_capabilities()
        _log.info("worker-started", extra={"worker_id": self.worker_id, "node": capabilities.node, "slots": capabilities.slots})

    def drain(self) -> None:
        """Stop claiming, finish what runs until the drain deadline, release the rest, end. Returns at once."""
        self._mailbox.put(_Word.DRAIN)

    def stop_now(self) -> None:
        """End at once: runners are killed and their plans released. Returns at once."""
        self._mailbox.put(_Word.STOP)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the worker has left; False after `timeout` seconds."""
        return self._ended.wait(timeout)

    def run_next(self, class_id: str) -> int:
        """A hint came for this class: claim and run, in the caller's thread, until nothing is left; returns how many plans."""
        if self._hints is not None:
            self._hints.heard(self._clock())
        if class_id not in self._classes:
            self._mailbox.put(_Word.WAKE)
        slot = None if self._is_leaving else self._slots.take()
        return 0 if slot is None else self._settle(slot, None)

    # --- the agent's thread

    @property
    def _is_leaving(self) -> bool:
        return self._drain_at is not None

    def _run(self) -> None:
        try:
            while not (self._is_leaving and self._slots.free_count == len(self._slots.all)):
                self._round()
                self._listen()
        finally:
            if not self._is_leaving:  # a bug ended this thread; nobody may take this worker for alive
                self._leave_by_itself(1)
            self._leave()

    def _round(self) -> None:
        """Everything that is due. Broad on purpose: this is the claim loop, and a bug must not leave a worker half alive."""
        now = self._clock()
        try:
            self._look_around(now)
            self._claim_when_due(now)
            self._beat_when_due(now)
            if self._hints is not None:
                wanted = frozenset() if self._is_leaving else self._classes
                self._hints.choose(wanted, is_full=self._slots.free_count == 0, now=now)
        except DatabaseUnavailable as error:
            if not self._is_away:
                _log.warning("database-away", extra={"worker_id": self.worker_id, "error": str(error)})
            self._is_away = True
            self._schedule.hold_off(self._clock(), AWAY_SECONDS)
        except Exception:  # noqa: BLE001 - the claim loop
            self._broken_rounds += 1
            self._well_since.clear()
            _log.exception("agent-broken", extra={"worker_id": self.worker_id, "rounds": self._broken_rounds})
            self._schedule.hold_off(self._clock(), AWAY_SECONDS)
            if self._broken_rounds >= MOST_BROKEN_ROUNDS and not self._is_leaving:
                self._leave_by_itself(1)

    def _went_well(self, duty: str) -> None:
        """The database answered; and once claims and heartbeats both work again, what broke before is forgotten."""
        self._is_away = False
        self._well_since.add(duty)
        if {"claim", "heartbeat"} <= self._well_since:
            self._broken_rounds = 0

    def _listen(self) -> None:
        """Wait for a word, or until something is due."""
        fast = self._tells_changes and not self._is_away
        pause = TOKEN_SECONDS if fast else min(self._schedule.next_due - self._clock(), LISTEN_SECONDS)
        try:
            word = self._mailbox.get(timeout=max(pause, 0.001))
        except queue.Empty:
            return
        if word is _Word.WAKE:
            self._schedule.poll_now()
        elif word is _Word.DRAIN:
            self._begin_drain()
        elif word is _Word.STOP:
            self._begin_drain()
            self._must_hurry = True

    def _look_around(self, now: float) -> None:
        """See whether the models or the machine have changed, and say so to the store."""
        seen = (self._shelf.models, self._inventory.speed)
        if now >= self._schedule.probe_at or seen != self._seen:
            self._schedule.probed(now)
            if self._inventory.look() != self._capabilities:
                self._register()
            self._seen = seen

    def _register(self) -> None:
        capabilities = self._inventory.look()
        self._store.leases.register(self.worker_id, capabilities, self._inventory.free_to_fleet(), os.getpid())
        self._capabilities, self._seen_seq, self._classes = capabilities, 0, frozenset()
        self._discover()
        self._schedule.poll_now()

    def _discover(self) -> None:
        """Match ourselves against the classes that we have not seen. Plans of a model that nobody has wait for another class."""
        capabilities = self._known_capabilities()
        for known in self._store.leases.new_classes(self._seen_seq):
            self._seen_seq = max(self._seen_seq, known.seq)
            if known.requirements is None:
                _log.warning("class-unreadable", extra={"worker_id": self.worker_id, "class_id": known.class_id})
            elif known.requirements.download is None and isinstance(match(known.requirements, capabilities), Match):
                self._models_of[known.class_id] = known.requirements.model_digest
                self._classes |= {known.class_id}

    def _claim_when_due(self, now: float) -> None:
        token = self._store.change_token()
        if self._is_leaving or not (self._schedule.token_changed(token) or now >= self._schedule.poll_at):
            return
        self._discover()
        while (slot := self._slots.take()) is not None:
            lease = self._new_lease()
            try:
                claimed = self._claim(slot, lease)
            except DatabaseUnavailable:
                self._threads.submit(self._settle, slot, lease)  # not here, where renewals would have to wait
                raise
            except BaseException:
                self._slots.give_back(slot)
                raise
            if claimed is None:
                self._slots.give_back(slot)
                break
            if self._hints is not None and self._hints.found_without(self._clock()):
                _log.warning("no-hints", extra={"worker_id": self.worker_id})
            self._threads.submit(self._work, slot, claimed, lease)
        self._schedule.polled(self._clock())
        self._went_well("claim")

    def _beat_when_due(self, now: float) -> None:
        """One heartbeat, which renews the leases whose work is alive."""
        if now < self._schedule.beat_at:
            return
        with self._leases_lock:
            held = {lease_id: lease for lease_id, (lease, _) in self._leases.items() if lease.is_attended(now)}
        sent_at, asked_ms = self._clock(), self._lease_ms
        live = self._inventory.free_to_fleet()
        renewal = self._store.leases.heartbeat(self.worker_id, live, tuple(held), len(held), lease_ms=asked_ms)
        for lease_id, lease in held.items():
            if lease_id not in renewal.held:
                lease.lose()
                continue
            lease.renewed(sent_at, seconds=asked_ms / 1000)
            lease.is_cancelled = lease.is_cancelled or lease_id in renewal.cancelled
        # Leases that begin with the next heartbeat to be longer must not wait longer for it.
        self._schedule.beaten(self._clock(), lease_seconds=asked_ms / 1000)
        self._lease_ms = lease_ms_in(renewal.fleet_size, self._store.lease_ms)
        self._went_well("heartbeat")
        if renewal.must_drain and not self._is_leaving:
            _log.info("drain-asked", extra={"worker_id": self.worker_id})
            self._leave_by_itself(0)
        elif not renewal.is_registered and not self._is_leaving:
            self._register()

    def _begin_drain(self) -> None:
        if self._drain_at is None:
            self._drain_at = self._clock() + self._terms.drain_seconds
            self._downloader.stop()
            _log.info("draining", extra={"worker_id": self.worker_id, "running": len(self._leases)})

    def _leave_by_itself(self, code: int) -> None:
        self._begin_drain()
        if self._on_end is not None:
            self._on_end(code)

    def _leave(self) -> None:
        """Nothing runs any more: say good-bye and give everything back."""
        try:
            self._downloader.wait()
            self._shelf.stop()
            for slot in self._slots.all:
                slot.close()
            self._threads.shutdown(wait=False)
            self._store.leases.retire(self.worker_id)
        except DatabaseUnavailable as error:
            _log.warning("not-retired", extra={"worker_id": self.worker_id, "error": str(error)})
        finally:
            self._ended.set()
        _log.info("worker-ended", extra={"worker_id": self.worker_id})

    def _guard_leases(self) -> None:
        """Kill the work of a lease that is too old, even while every other thread waits for the database."""
        while not self._ended.wait(GUARD_SECONDS):
            now = self._clock()
            with self._leases_lock:
                held = list(self._leases.values())
            for lease, slot in held:
                if lease.is_too_old(now):
                    slot.runner.kill()

    # --- claiming and working

    def _new_lease(self) -> Lease:
        return Lease(str(uuid.uuid4()), seconds=self._lease_ms / 1000, sent_at=self._clock())

    def _claim(self, slot: Slot, lease: Lease) -> Assignment | None:
        """The best plan of our classes, if there is one. After DatabaseUnavailable it may have been claimed all the same."""
        if not self._classes or self._is_leaving:
            return None
        classes = self._classes
        warm = {name for name in classes if slot.has_warm(self._models_of[name])}
        asked_ms = round(lease.seconds * 1000)
        claimed = self._store.leases.claim(self.worker_id, lease.lease_id, classes, warm=warm, lease_ms=asked_ms)
        return self._admit(slot, lease, claimed)

    def _claim_for_sure(self, slot: Slot, lease: Lease) -> Assignment | None:
        """The same; when the reply was lost, the store is asked what the lease holds, until the lease is too old."""
        try:
            return self._claim(slot, lease)
        except DatabaseUnavailable:
            return self._claimed_after_all(slot, lease)

    def _claimed_after_all(self, slot: Slot, lease: Lease) -> Assignment | None:
        while lease.may_record(self._clock()) and not self._is_leaving:
            slot.pause(AWAY_SECONDS)
            try:
                return self._admit(slot, lease, self._store.leases.claimed(lease.lease_id))
            except DatabaseUnavailable:
                continue
        return None

    def _admit(self, slot: Slot, lease: Lease, assignment: Assignment | None) -> Assignment | None:
        """From here on the lease is renewed."""
        if assignment is not None:
            with self._leases_lock:
                self._leases[lease.lease_id] = (lease, slot)
            _log.info("claimed", extra={"plan_id": assignment.plan_id, "lease_id": lease.lease_id, "attempt": assignment.attempt})
        return assignment

    def _settle(self, slot: Slot, lease: Lease | None) -> int:
        """Claim for a slot that was taken, or settle a claim whose reply was lost, and work; returns how many plans were run."""
        try:
            if lease is None:
                lease = self._new_lease()
                claimed = self._claim_for_sure(slot, lease)
            else:
                claimed = self._claimed_after_all(slot, lease)
        except BaseException:
            self._slots.give_back(slot)
            raise
        if claimed is None:
            self._slots.give_back(slot)
            return 0
        return self._work(slot, claimed, lease)

    def _work(self, slot: Slot, assignment: Assignment, lease: Lease) -> int:
        """Run this plan and the next best ones; returns how many. Then the slot is free."""
        done, following = 0, assignment
        try:
            while True:
                self._run_one(slot, following, lease)
                done += 1
                lease = self._new_lease()
                claimed = self._claim_for_sure(slot, lease)
                if claimed is None:
                    return done
                following = claimed
        finally:
            self._slots.give_back(slot)
            self._mailbox.put(_Word.FREE)  # which has just found no more work

    def _run_one(self, slot: Slot, assignment: Assignment, lease: Lease) -> None:
        """Broad on purpose, as the claim loop: what is a bug here costs this attempt, not the worker."""
        ending = Ending.LOST
        try:
            ending = Attempt(assignment, lease, slot, self._surroundings).run()
        except Exception as error:  # noqa: BLE001 - the claim loop
            _log.exception("attempt-broken", extra={"plan_id": assignment.plan_id, "lease_id": lease.lease_id})
            slot.runner.kill()
            failure = Failure(code="worker_error", message=f"The worker failed: {type(error).__name__}")
            try:
                self._store.leases.fail(lease.lease_id, failure)
            except DatabaseUnavailable:
                slot.pause(AWAY_SECONDS)  # the reaper takes it
        finally:
            with self._leases_lock:
                self._leases.pop(lease.lease_id, None)
        _log.info("ended", extra={"plan_id": assignment.plan_id, "lease_id": lease.lease_id, "ending": ending.value})

    def _known_capabilities(self) -> Capabilities:
        if self._capabilities is None:
            raise RuntimeError("the agent was not started")
        return self._capabilities
