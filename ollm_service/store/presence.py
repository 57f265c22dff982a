"""Which workers are there, what do they offer, and are they still alive?

Lock order: plans by id, then the worker, then the counter.
"""

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, case, func, insert, select, update

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.leasing import Renewal
from ollm_service.core.lifecycle import HELD_STATES
from ollm_service.core.wire import from_json, to_json
from ollm_service.store.columns import now_ms
from ollm_service.store.tables import counters, runtime_plans, workers

ACTIVE, DRAINING, GONE = "active", "draining", "gone"


def register(connection: Connection, worker_id: str, capabilities: Capabilities, live: LiveState, pid: int) -> None:
    """Insert the worker or renew what is known of it; one that is draining goes on draining."""
    known = connection.execute(
        select(workers.c.state, workers.c.capabilities).where(workers.c.id == worker_id).with_for_update()
    ).one_or_none()
    values = {
        "node": capabilities.node,
        "pid": pid,
        "slots": capabilities.slots,
        "capabilities": to_json(capabilities),
        "devices": ", ".join(f"{device.device_id} ({device.name})" for device in capabilities.devices),
        "passes": ",".join(pass_id for pass_id, lacking in capabilities.passes.items() if lacking is None),
        **_live_columns(live),
    }
    if known is None:
        fresh = {"id": worker_id, "state": ACTIVE, "running": 0, **values}
        connection.execute(insert(workers).values(started_ms=now_ms(), heartbeat_ms=now_ms(), **fresh))
    else:
        state = DRAINING if known.state == DRAINING else ACTIVE
        changed = update(workers).where(workers.c.id == worker_id)
        connection.execute(changed.values(state=state, heartbeat_ms=now_ms(), **values))
    offered = set() if known is None or known.state == GONE else _offer(from_json(Capabilities, known.capabilities))
    if offered != _offer(capabilities):
        count_inventory_change(connection)


def _offer(capabilities: Capabilities) -> set[tuple[Any, ...]]:
    """What a worker adds to the fleet's inventory. Whether it may download decides about models that nobody has."""
    models = {(model.name, str(model.path), model.digest) for model in capabilities.models if model.is_usable}
    return {("may download", capabilities.may_download, *capabilities.downloadable), *models}


def _live_columns(live: LiveState) -> dict[str, Any]:
    return {
        "live": to_json(live),
        "device_free_bytes": max(live.device_free_bytes.values(), default=0),
        "host_free_bytes": live.host_free_bytes,
        "warm_model": live.warm_model,
    }


def heartbeat(
    connection: Connection, worker_id: str, live: LiveState, lease_ids: Collection[str], running: int, lease_ms: int
) -> Renewal:
    """Renew these leases, in the order of the plans' ids, and tell which of them still hold.

    None ends sooner than it would have: a worker that never hears the answer goes by the renewal before.
    """
    plan = runtime_plans.c
    held: dict[str, bool] = {}
    if lease_ids:
        wanted = select(plan.id, plan.lease_id, plan.cancel_requested)
        wanted = wanted.where(plan.lease_id.in_(lease_ids), plan.state.in_(HELD_STATES))
        rows = connection.execute(wanted.order_by(plan.id).with_for_update(key_share=True)).all()
        held = {row.lease_id: row.cancel_requested for row in rows}
        renewed = update(runtime_plans).where(plan.id.in_([row.id for row in rows]))
        later = now_ms() + lease_ms
        ends = case((plan.lease_expires_ms > later, plan.lease_expires_ms), else_=later)
        connection.execute(renewed.values(lease_expires_ms=ends))
    seen = update(workers).where(workers.c.id == worker_id, workers.c.state != GONE)
    seen = seen.values(heartbeat_ms=now_ms(), running=running, **_live_columns(live)).returning(workers.c.state)
    state = connection.execute(seen).scalar_one_or_none()
    return Renewal(
        is_registered=state is not None,
        held=frozenset(held),
        cancelled=frozenset(lease_id for lease_id, is_cancelled in held.items() if is_cancelled),
        must_drain=state == DRAINING,
        fleet_size=fleet_size(connection),
    )


def fleet_size(connection: Connection) -> int:
    """How many workers send heartbeats."""
    beating = select(func.count()).select_from(workers).where(workers.c.state != GONE)
    return int(connection.execute(beating).scalar_one())


def retire(connection: Connection, worker_id: str) -> None:
    """The worker is gone; what it still holds is left to the reaper."""
    left = update(workers).where(workers.c.id == worker_id, workers.c.state != GONE).values(state=GONE, running=0)
    if connection.execute(left).rowcount:
        count_inventory_change(connection)


def count_inventory_change(connection: Connection) -> None:
    """The fleet's models changed: what was planned before may be planned better now."""
    name = counters.c.name == "inventory_seq"
    connection.execute(update(counters).where(name).values(value=counters.c.value + 1))
