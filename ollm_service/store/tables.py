"""Which rows are there? The tables as typed metadata; the migrations create them, and a test holds the two together.

Times are epoch milliseconds from the database's clock. Everything is unique per tenant. `runtime_plans` is the unit of dispatch;
whoever locks several rows locks plans by id first and the job after them.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
    false,
    text,
)

from ollm_service.core.lifecycle import FINAL_STATES, HELD_STATES
from ollm_service.store.columns import JsonText, PlainText

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _in(states: frozenset[str]) -> str:
    return ", ".join(f"'{state}'" for state in sorted(states))


QUEUED = "state = 'queued'"
HELD = f"state IN ({_in(frozenset(HELD_STATES))})"
UNDER_WAY = "state IN ('queued', 'running')"
UNFINISHED = f"state NOT IN ({_in(frozenset(FINAL_STATES))})"

jobs = Table(
    "jobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", String, nullable=False),
    Column("model", PlainText, nullable=False),
    Column("config", JsonText, nullable=False),
    Column("generation", JsonText, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("where_clause", PlainText),
    Column("idempotency_key", JsonText),
    Column("body_digest", String, nullable=False),
    Column("retry_of", String),
    Column("quoted", JsonText, comment="what its preview said of its time; NULL without one"),
    Column("row_count", Integer, nullable=False),
    Column("plans_total", Integer, nullable=False),
    Column("seq", BigInteger, nullable=False, comment="the newest result's cursor"),
    Column("succeeded", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("deadline_ms", BigInteger),
    UniqueConstraint("tenant_id", "idempotency_key"),
    Index(None, "tenant_id", "created_ms", "id"),
)

job_rows = Table(
    "job_rows",
    metadata,
    Column("job_id", String, ForeignKey("jobs.id"), nullable=False),
    Column("row", Integer, nullable=False),
    Column("plan_id", String, nullable=False),
    Column("custom_id", JsonText, nullable=False),
    Column("request", JsonText, nullable=False),
    PrimaryKeyConstraint("job_id", "row"),
    Index(None, "plan_id", "row"),
)

plan_classes = Table(
    "plan_classes",
    metadata,
    Column("class_id", String, primary_key=True),
    Column("seq", BigInteger, nullable=False, unique=True, comment="numbered in commit order"),
    Column("requirements", JsonText, nullable=False),
)

runtime_plans = Table(
    "runtime_plans",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", String, nullable=False),
    Column("job_id", String, ForeignKey("jobs.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("model", PlainText, nullable=False),
    Column("class_id", String, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("condition", String),
    Column("planned", JsonText, nullable=False, comment="the RuntimePlan as intended"),
    Column("schema_version", Integer, nullable=False, comment="of the RuntimePlan as intended"),
    Column("finalized", JsonText, comment="the RuntimePlan of the newest attempt that recorded a row"),
    Column("finalized_by", Integer, comment="that attempt"),
    Column("profile", JsonText),
    Column("config", JsonText, nullable=False),
    Column("inventory_seq", BigInteger, nullable=False),
    # What the views show of the newest RuntimePlan; kept beside the JSON so that SQL needs no JSON functions.
    Column("backend_id", String),
    Column("support_level", String, nullable=False),
    Column("specialization_state", String, nullable=False),
    Column("planned_passes", String, nullable=False),
    Column("applied_passes", String, nullable=False),
    Column("fallback_reason", PlainText),
    Column("row_count", Integer, nullable=False),
    Column("rows_done", Integer, nullable=False),
    Column("rows_failed", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False, server_default=false()),
    Column("lease_id", String),
    Column("lease_expires_ms", BigInteger),
    Column("worker_id", String),
    Column("worker_node", String),
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("declines", Integer, nullable=False),
    Column("micro_batch_limit", Integer),
    Column("lone_crashes", JsonText, nullable=False),
    Column("reason", PlainText),
    Column("created_ms", BigInteger, nullable=False),
    Column("available_ms", BigInteger, nullable=False),
    Column("deadline_ms", BigInteger),
    Column("queued_ms", BigInteger, nullable=False),
    Column("started_ms", BigInteger),
    Column("finished_ms", BigInteger),
    UniqueConstraint("job_id", "number"),
    UniqueConstraint("lease_id"),
)
# The claim walks this index from its top; a plan leaves it when it is claimed.
Index(
    "ix_runtime_plans_claim",
    runtime_plans.c.class_id,
    runtime_plans.c.priority.desc(),
    runtime_plans.c.created_ms,
    runtime_plans.c.number,
    runtime_plans.c.id,
    postgresql_where=text(QUEUED),
    sqlite_where=text(QUEUED),
)
for _name, _columns, _where in (
    ("ix_runtime_plans_stale", (runtime_plans.c.inventory_seq,), QUEUED),
    ("ix_runtime_plans_expiring", (runtime_plans.c.lease_expires_ms,), HELD),
    ("ix_runtime_plans_held", (runtime_plans.c.worker_id,), HELD),
    ("ix_runtime_plans_deadline", (runtime_plans.c.deadline_ms,), f"deadline_ms IS NOT NULL AND {UNFINISHED}"),
):
    Index(_name, *_columns, postgresql_where=text(_where), sqlite_where=text(_where))

attempts = Table(
    "attempts",
    metadata,
    Column("plan_id", String, ForeignKey("runtime_plans.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("lease_id", String, nullable=False, unique=True),
    Column("worker_id", String, nullable=False),
    Column("worker_node", String, nullable=False),
    Column("model_digest", String, comment="what it ran; NULL where the plan could not be read"),
    Column("outcome", String, nullable=False),
    Column("ended_by", String, comment="the verb that ended it, so that a verb whose reply was lost can be answered again"),
    Column("runtime_plan", JsonText),
    Column("placement", JsonText),
    Column("measured", JsonText),
    Column("started_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger),
    PrimaryKeyConstraint("plan_id", "number"),
    Index(None, "model_digest", "ended_ms"),
)

exclusions = Table(
    "exclusions",
    metadata,
    Column("plan_id", String, ForeignKey("runtime_plans.id"), nullable=False),
    Column("node", String, nullable=False),
    Column("until_ms", BigInteger, nullable=False),
    Column("is_decline", Boolean, nullable=False),
    Column("reason", PlainText),
    PrimaryKeyConstraint("plan_id", "node"),
)

results = Table(
    "results",
    metadata,
    Column("job_id", String, ForeignKey("jobs.id"), nullable=False),
    Column("row", Integer, nullable=False),
    Column("seq", BigInteger, nullable=False, comment="the cursor: numbered in commit order within the job"),
    Column("plan_id", String, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("text", JsonText),
    Column("finish_reason", String),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("error_code", String),
    Column("error_message", PlainText),
    Column("created_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("job_id", "row"),
    UniqueConstraint("job_id", "seq"),
)

plan_events = Table(
    "plan_events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("tenant_id", String, nullable=False),
    Column("job_id", String, nullable=False),
    Column("plan_id", String, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    Column("from_state", String),
    Column("to_state", String),
    Column("worker_id", String),
    Column("worker_node", String),
    Column("reason", PlainText),
    Index(None, "plan_id", "id"),
    Index(None, "job_id", "id"),
    comment="append-only: a trigger forbids UPDATE and DELETE",
)

workers = Table(
    "workers",
    metadata,
    Column("id", String, primary_key=True),
    Column("node", String, nullable=False),
    Column("state", String, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("running", Integer, nullable=False),
    Column("capabilities", JsonText, nullable=False),
    Column("live", JsonText, nullable=False),
    # What the view shows of the two above.
    Column("devices", PlainText, nullable=False),
    Column("passes", String, nullable=False),
    Column("device_free_bytes", BigInteger, nullable=False),
    Column("host_free_bytes", BigInteger, nullable=False),
    Column("warm_model", PlainText),
    Column("started_ms", BigInteger, nullable=False),
    Column("heartbeat_ms", BigInteger, nullable=False),
    Index(None, "state"),
)

previews = Table(
    "previews",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", String, nullable=False),
    Column("request", JsonText, nullable=False, comment="what was asked for, without its rows"),
    Column("planned", JsonText, nullable=False),
    Column("requirements", JsonText, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Index(None, "created_ms"),
)

downloads = Table(
    "downloads",
    metadata,
    Column("id", String, primary_key=True),
    Column("reference", String, nullable=False, comment="org/name or org/name@revision"),
    Column("repo_id", String, nullable=False),
    Column("revision", String),
    Column("folder", String, nullable=False, comment="of the models root"),
    Column("target", String, nullable=False, comment="the node that was asked for; empty: any"),
    Column("nodes", JsonText, comment="the nodes that may take it; NULL: any"),
    Column("state", String, nullable=False),
    Column("lease_id", String, unique=True),
    Column("lease_expires_ms", BigInteger),
    Column("worker_id", String),
    Column("worker_node", String),
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False, comment="without a new byte"),
    Column("losses", Integer, nullable=False, comment="without a new byte"),
    Column("commit_id", String, comment="what the revision meant when it began"),
    Column("bytes_done", BigInteger, nullable=False),
    Column("bytes_total", BigInteger),
    Column("reason", PlainText),
    Column("is_everywhere", Boolean, nullable=False, comment="whether it would fail on any worker"),
    Column("created_ms", BigInteger, nullable=False),
    Column("available_ms", BigInteger, nullable=False),
    Column("started_ms", BigInteger),
    Column("finished_ms", BigInteger),
    Index(None, "created_ms"),
)
# Of one model at most one that is under way, for each node that was asked for and for any.
Index(
    "uq_downloads_active",
    downloads.c.reference,
    downloads.c.folder,
    downloads.c.target,
    unique=True,
    postgresql_where=text(UNDER_WAY),
    sqlite_where=text(UNDER_WAY),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String, primary_key=True),
    Column("value", BigInteger, nullable=False),
    comment="class_seq, inventory_seq, and when reaping may go on after an outage",
)
