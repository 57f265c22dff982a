"""Which models are fetched from the hub, by whom, and how far is that? Downloads are leased like plans, and tell their plans.

A worker's writes are guarded by its lease; a download whose lease ran out is queued again, and whoever takes it goes on with what
lies on its disk. Every verb may be repeated with the same arguments when its reply was lost.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, case, func, insert, literal, null, select, update
from sqlalchemy.exc import IntegrityError

from ollm_service.core.downloading import DownloadState, HubModel
from ollm_service.core.errors import NotFound
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.requirements import Requirements
from ollm_service.core.retry import MOST_LOSSES, Failure, GiveUp, decide
from ollm_service.store.columns import as_text, now_ms
from ollm_service.store.engine import Database
from ollm_service.store.mapping import decoded_or_none
from ollm_service.store.presence import ACTIVE
from ollm_service.store.tables import downloads, plan_classes, plan_events, runtime_plans, workers

STARTED, ENDED, FAILED = "download-started", "download-done", "download-failed"
_DOWNLOAD, _PLAN = downloads.c, runtime_plans.c
_UNDER_WAY = _DOWNLOAD.state.in_((DownloadState.QUEUED.value, DownloadState.RUNNING.value))
_ACTIVE_AGAIN = 3  # tries to insert beside others who insert and end the same


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadView:
    """A download. Sizes are bytes; `bytes_total` is None until the hub has told it.

    `nodes` are those that may take it, None for any; `target` the one that was asked for. `worker_id` and `node` name who has it,
    or had it last. `reason` explains the newest change for the worse; `is_everywhere`: it would fail on any worker.
    """

    download_id: str
    reference: str
    repo_id: str
    revision: str | None
    folder: str
    target: str | None
    nodes: tuple[str, ...] | None
    state: DownloadState
    worker_id: str | None
    node: str | None
    attempt: int
    commit_id: str | None
    bytes_done: int
    bytes_total: int | None
    reason: str | None
    is_everywhere: bool
    created_ms: int
    started_ms: int | None
    finished_ms: int | None

    @property
    def model(self) -> HubModel:
        """What is downloaded."""
        return HubModel(repo_id=self.repo_id, revision=self.revision, folder=self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedModel:
    """A reference that queued plans of a class bear. `newest_ms`: when the newest of them was submitted."""

    model: str
    class_id: str
    newest_ms: int


class Downloads:
    """Downloads. `draw` returns a random number in [0, 1) for the jitter of retries."""

    def __init__(self, database: Database, *, lease_ms: int, draw: Callable[[], float]) -> None:
        self._database, self.lease_ms, self._draw = database, lease_ms, draw

    # --- asking

    def request(
        self, model: HubModel, download_id: str, *, target: str | None = None, nodes: Collection[str] | None = None
    ) -> tuple[DownloadView, bool]:
        """Ask for a model on the node `target`, or on any one of `nodes`; false: that is under way already, and is returned.

        A queued one may then be taken by these nodes, too.
        """
        same = (
            _DOWNLOAD.reference == model.reference,
            _DOWNLOAD.folder == model.folder,
            _DOWNLOAD.target == (target or ""),
        )

        def work(connection: Connection) -> tuple[DownloadView, bool]:
            row = connection.execute(select(downloads).where(*same, _UNDER_WAY).with_for_update()).one_or_none()
            if row is None:
                allowed = [target] if target else None if nodes is None else sorted(nodes)
                connection.execute(insert(downloads).values(**_fresh(model, download_id, target), nodes=allowed))
                return _one(connection, download_id), True
            if row.nodes is not None and not target:
                wider = None if nodes is None else sorted({*row.nodes, *nodes})
                if wider != row.nodes:
                    connection.execute(update(downloads).where(_DOWNLOAD.id == row.id).values(nodes=wider))
            return _one(connection, row.id), False

        for _ in range(_ACTIVE_AGAIN - 1):
            try:
                return self._database.write(work, recover=lambda connection: _known(connection, download_id))
            except IntegrityError:  # somebody else has just asked for the same
                continue
        return self._database.write(work)

    # --- looking

    def get(self, download_id: str) -> DownloadView:
        """One download. Raises NotFound."""
        return self._database.look(lambda connection: _one(connection, download_id))

    def list(self, *, reference: str | None = None, limit: int = 1_000) -> Sequence[DownloadView]:
        """The newest first; of one repository and revision where that is given."""
        query = select(downloads).order_by(_DOWNLOAD.created_ms.desc(), _DOWNLOAD.id.desc()).limit(limit)
        if reference is not None:
            query = query.where(_DOWNLOAD.reference == reference)
        return self._database.look(lambda connection: [_view(row) for row in connection.execute(query)])

    def wanted(self, class_ids: Collection[str]) -> Sequence[WantedModel]:
        """The references of the queued plans of these classes."""
        if not class_ids:
            return []
        query = select(_PLAN.model, _PLAN.class_id, func.max(_PLAN.created_ms).label("newest_ms"))
        query = query.where(_PLAN.state == ExecutionState.QUEUED.value, _PLAN.class_id.in_(class_ids))
        query = query.group_by(_PLAN.model, _PLAN.class_id).order_by(_PLAN.model, _PLAN.class_id)
        return self._database.look(
            lambda connection: [
                WantedModel(model=row.model, class_id=row.class_id, newest_ms=row.newest_ms) for row in connection.execute(query)
            ]
        )

    # --- a worker's verbs

    def claim(self, worker_id: str, node: str, lease_id: str, may_fetch: Callable[[str], bool]) -> DownloadView | None:
        """Lease the oldest download that this worker may do, under a new random UUID; None where there is none."""
        waiting = (_DOWNLOAD.state == DownloadState.QUEUED.value, _DOWNLOAD.available_ms <= now_ms())
        query = select(_DOWNLOAD.id, _DOWNLOAD.repo_id, _DOWNLOAD.nodes).where(*waiting)
        rows = self._database.look(lambda connection: connection.execute(query.order_by(_DOWNLOAD.created_ms)).all())
        for row in rows:
            if may_fetch(row.repo_id) and (row.nodes is None or node in row.nodes):
                claimed = self._claim(row.id, worker_id, node, lease_id, waiting)
                if claimed is not None:
                    return claimed
        return None

    def _claim(
        self, download_id: str, worker_id: str, node: str, lease_id: str, waiting: tuple[ColumnElement[bool], ...]
    ) -> DownloadView | None:
        is_active = select(workers.c.id).where(workers.c.id == worker_id, workers.c.state == ACTIVE).exists()
        taken = update(downloads).where(_DOWNLOAD.id == download_id, *waiting, is_active)
        taken = taken.values(
            state=DownloadState.RUNNING.value,
            lease_id=lease_id,
            lease_expires_ms=now_ms() + self.lease_ms,
            worker_id=worker_id,
            worker_node=node,
            attempt=_DOWNLOAD.attempt + 1,
            started_ms=func.coalesce(_DOWNLOAD.started_ms, now_ms()),
        )

        def work(connection: Connection) -> DownloadView | None:
            if not connection.execute(taken).rowcount:
                return None
            view = _one(connection, download_id)
            _tell(connection, view, STARTED, view.reason)
            return view

        def known(connection: Connection) -> DownloadView | None:
            row = connection.execute(select(downloads).where(_DOWNLOAD.lease_id == lease_id)).one_or_none()
            return None if row is None else _view(row)

        return self._database.write(work, recover=known)

    def progress(self, lease_id: str, bytes_done: int, *, bytes_total: int | None = None, commit_id: str | None = None) -> bool:
        """Renew the lease and say how far it is; false: the lease is lost. New bytes make failures and losses forgotten."""
        is_further = _DOWNLOAD.bytes_done < bytes_done
        told = _held(lease_id).values(
            lease_expires_ms=now_ms() + self.lease_ms,
            bytes_done=bytes_done,
            bytes_total=func.coalesce(literal(bytes_total, _DOWNLOAD.bytes_total.type), _DOWNLOAD.bytes_total),
            commit_id=func.coalesce(literal(commit_id, _DOWNLOAD.commit_id.type), _DOWNLOAD.commit_id),
            failures=case((is_further, 0), else_=_DOWNLOAD.failures),
            losses=case((is_further, 0), else_=_DOWNLOAD.losses),
            reason=case((is_further, null()), else_=_DOWNLOAD.reason),
        )
        return self._database.write(lambda connection: connection.execute(told).rowcount) > 0

    def finish(self, lease_id: str) -> bool:
        """The model is there; false: the lease is lost."""

        def work(connection: Connection) -> bool:
            row = _lock(connection, lease_id)
            if row is None:
                return False
            whole = func.coalesce(_DOWNLOAD.bytes_total, _DOWNLOAD.bytes_done)
            _end(connection, row, DownloadState.DONE, reason=None, bytes_done=whole)
            _tell(connection, _one(connection, row.id), ENDED, f"{row.reference} is on {row.worker_node}")
            return True

        return self._database.write(work)

    def fail(self, lease_id: str, failure: Failure, *, is_everywhere: bool = False) -> DownloadState | None:
        """It failed: queued again for a later try, or failed where that cannot help; None: the lease is lost."""

        def work(connection: Connection) -> DownloadState | None:
            row = _lock(connection, lease_id)
            if row is None:
                return None
            failures = row.failures + 1
            decision = decide(failure, failures, self._draw)
            if isinstance(decision, GiveUp):
                _end(
                    connection, row, DownloadState.FAILED, reason=failure.message, failures=failures, is_everywhere=is_everywhere
                )
                _tell(connection, _one(connection, row.id), FAILED, failure.message)
                return DownloadState.FAILED
            _queue_again(connection, row, reason=failure.message, wait_ms=decision.after_ms, failures=failures)
            return DownloadState.QUEUED

        return self._database.write(work)

    def release(self, lease_id: str, *, reason: str, wait_ms: int = 0) -> bool:
        """Give it back unharmed; false: the lease is lost."""

        def work(connection: Connection) -> bool:
            row = _lock(connection, lease_id)
            if row is not None:
                _queue_again(connection, row, reason=reason, wait_ms=wait_ms)
            return row is not None

        return self._database.write(work)

    # --- what the coordinators do

    def reap(self, limit: int = 100) -> int:
        """Queue what silent workers had, and fail what was lost again and again without a new byte; how many."""
        ran_out = (_DOWNLOAD.state == DownloadState.RUNNING.value) & (_DOWNLOAD.lease_expires_ms < now_ms())
        found = select(_DOWNLOAD.id).where(ran_out).limit(limit)
        # On SQLite whoever writes keeps all others waiting: a look first.
        ids = self._database.look(lambda connection: connection.execute(found).scalars().all())

        def one(connection: Connection, download_id: str) -> bool:
            query = select(downloads).where(_DOWNLOAD.id == download_id, ran_out).with_for_update(skip_locked=True)
            row = connection.execute(query).one_or_none()
            if row is None:
                return False
            losses = row.losses + 1
            if losses < MOST_LOSSES:
                _queue_again(connection, row, reason=f"{row.worker_node} fell silent", losses=losses)
                return True
            reason = f"{losses} workers were lost with it without a new byte; the last was {row.worker_node}"
            _end(connection, row, DownloadState.FAILED, reason=reason, losses=losses)
            _tell(connection, _one(connection, row.id), FAILED, reason)
            return True

        def reaper(download_id: str) -> Callable[[Connection], bool]:
            return lambda connection: one(connection, download_id)

        return sum(self._database.write(reaper(download_id)) for download_id in ids)

    def forget(self, older_than_ms: int) -> int:
        """Delete what ended this long ago; how many."""
        old = ~_UNDER_WAY & (_DOWNLOAD.finished_ms < now_ms() - older_than_ms)
        if not self._database.look(lambda connection: connection.execute(select(_DOWNLOAD.id).where(old).limit(1)).first()):
            return 0
        return self._database.write(lambda connection: connection.execute(downloads.delete().where(old)).rowcount)


def _fresh(model: HubModel, download_id: str, target: str | None) -> dict[str, Any]:
    return {
        "id": download_id,
        "reference": model.reference,
        "repo_id": model.repo_id,
        "revision": model.revision,
        "folder": model.folder,
        "target": target or "",
        "state": DownloadState.QUEUED.value,
        **dict.fromkeys(("attempt", "failures", "losses", "bytes_done"), 0),
        "is_everywhere": False,
        "created_ms": now_ms(),
        "available_ms": now_ms(),
    }


def _held(lease_id: str) -> Any:
    return update(downloads).where(_DOWNLOAD.lease_id == lease_id, _DOWNLOAD.state == DownloadState.RUNNING.value)


def _lock(connection: Connection, lease_id: str) -> Row[Any] | None:
    """What this lease holds, locked; None where it holds nothing any more: the guard of a worker's writes."""
    held = select(downloads).where(_DOWNLOAD.lease_id == lease_id, _DOWNLOAD.state == DownloadState.RUNNING.value)
    return connection.execute(held.with_for_update()).one_or_none()


def _end(connection: Connection, row: Row[Any], state: DownloadState, **values: Any) -> None:
    ended = update(downloads).where(_DOWNLOAD.id == row.id)
    connection.execute(ended.values(state=state.value, lease_id=None, lease_expires_ms=None, finished_ms=now_ms(), **values))


def _queue_again(connection: Connection, row: Row[Any], *, reason: str, wait_ms: int = 0, **values: Any) -> None:
    queued = update(downloads).where(_DOWNLOAD.id == row.id)
    later = {"lease_id": None, "lease_expires_ms": None, "available_ms": now_ms() + wait_ms}
    connection.execute(queued.values(state=DownloadState.QUEUED.value, reason=reason, **later, **values))


def _tell(connection: Connection, download: DownloadView, kind: str, reason: str | None) -> None:
    """Append an event to the history of every queued plan that waits for this model."""
    is_waiting = _PLAN.state == ExecutionState.QUEUED.value
    waiting = select(plan_classes.c.class_id, as_text(plan_classes.c.requirements))
    waiting = waiting.where(plan_classes.c.class_id.in_(select(_PLAN.class_id).where(is_waiting).distinct()))
    needs = {row.class_id: decoded_or_none(Requirements, row.requirements) for row in connection.execute(waiting)}
    classes = [class_id for class_id, found in needs.items() if found and found.download == download.reference]
    if not classes:
        return
    names = ("tenant_id", "job_id", "plan_id", "at_ms", "kind", "from_state", "to_state", "worker_id", "worker_node", "reason")
    source = select(
        *(_PLAN.tenant_id, _PLAN.job_id, _PLAN.id, now_ms(), literal(kind), _PLAN.state, _PLAN.state),
        *(literal(download.worker_id), literal(download.node), literal(reason, plan_events.c.reason.type)),
    )
    source = source.where(is_waiting, _PLAN.class_id.in_(classes)).order_by(_PLAN.id)
    connection.execute(insert(plan_events).from_select(names, source))


def _known(connection: Connection, download_id: str) -> tuple[DownloadView, bool] | None:
    row = connection.execute(select(downloads).where(_DOWNLOAD.id == download_id)).one_or_none()
    return None if row is None else (_view(row), True)


def _one(connection: Connection, download_id: str) -> DownloadView:
    row = connection.execute(select(downloads).where(_DOWNLOAD.id == download_id)).one_or_none()
    if row is None:
        raise NotFound(f"There is no download {download_id}.", remedy="GET /v1/downloads lists them.")
    return _view(row)


def _view(row: Row[Any]) -> DownloadView:
    return DownloadView(
        download_id=row.id,
        reference=row.reference,
        repo_id=row.repo_id,
        revision=row.revision,
        folder=row.folder,
        target=row.target or None,
        nodes=None if row.nodes is None else tuple(row.nodes),
        state=DownloadState(row.state),
        worker_id=row.worker_id,
        node=row.worker_node,
        attempt=row.attempt,
        commit_id=row.commit_id,
        bytes_done=row.bytes_done,
        bytes_total=row.bytes_total,
        reason=row.reason,
        is_everywhere=row.is_everywhere,
        created_ms=row.created_ms,
        started_ms=row.started_ms,
        finished_ms=row.finished_ms,
    )
