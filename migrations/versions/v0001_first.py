"""Jobs, plan records, leases, results, events and workers; the views for people who monitor with SQL."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

BIG, INT, STR, TEXT = sa.BigInteger(), sa.Integer(), sa.String(), sa.Text()


def _need(name: str, kind: sa.types.TypeEngine[Any], **more: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, **more)


def upgrade() -> None:
    _jobs()
    _plans()
    _plan_history()
    _fleet()
    _indexes()
    _append_only_events()
    _views()
    _reader()


def _jobs() -> None:
    op.create_table(
        "jobs",
        _need("id", STR),
        _need("tenant_id", STR),
        _need("model", TEXT),
        _need("config", TEXT),
        _need("generation", TEXT),
        _need("priority", INT),
        sa.Column("where_clause", TEXT),
        sa.Column("idempotency_key", TEXT),
        _need("body_digest", STR),
        sa.Column("retry_of", STR),
        _need("row_count", INT),
        _need("plans_total", INT),
        _need("seq", BIG, comment="the newest result's cursor"),
        _need("succeeded", INT),
        _need("failed", INT),
        _need("prompt_tokens", BIG),
        _need("completion_tokens", BIG),
        _need("created_ms", BIG),
        sa.Column("deadline_ms", BIG),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("tenant_id", "idempotency_key", name="uq_jobs_tenant_id_idempotency_key"),
    )
    op.create_table(
        "job_rows",
        _need("job_id", STR),
        _need("row", INT),
        _need("plan_id", STR),
        _need("custom_id", TEXT),
        _need("request", TEXT),
        sa.PrimaryKeyConstraint("job_id", "row", name="pk_job_rows"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_rows_job_id_jobs"),
    )
    op.create_table(
        "results",
        _need("job_id", STR),
        _need("row", INT),
        _need("seq", BIG, comment="the cursor: numbered in commit order within the job"),
        _need("plan_id", STR),
        _need("attempt", INT),
        sa.Column("text", TEXT),
        sa.Column("finish_reason", STR),
        _need("prompt_tokens", INT),
        _need("completion_tokens", INT),
        sa.Column("error_code", STR),
        sa.Column("error_message", TEXT),
        _need("created_ms", BIG),
        sa.PrimaryKeyConstraint("job_id", "row", name="pk_results"),
        sa.UniqueConstraint("job_id", "seq", name="uq_results_job_id_seq"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_results_job_id_jobs"),
    )


def _plans() -> None:
    op.create_table(
        "plan_classes",
        _need("class_id", STR),
        _need("seq", BIG, comment="numbered in commit order"),
        _need("requirements", TEXT),
        sa.PrimaryKeyConstraint("class_id", name="pk_plan_classes"),
        sa.UniqueConstraint("seq", name="uq_plan_classes_seq"),
    )
    op.create_table(
        "runtime_plans",
        _need("id", STR),
        _need("tenant_id", STR),
        _need("job_id", STR),
        _need("number", INT),
        _need("model", TEXT),
        _need("class_id", STR),
        _need("priority", INT),
        _need("state", STR),
        sa.Column("condition", STR),
        _need("planned", TEXT, comment="the RuntimePlan as intended"),
        _need("schema_version", INT, comment="of the RuntimePlan as intended"),
        sa.Column("finalized", TEXT, comment="the RuntimePlan of the newest attempt that recorded a row"),
        sa.Column("finalized_by", INT, comment="that attempt"),
        sa.Column("profile", TEXT),
        _need("config", TEXT),
        _need("inventory_seq", BIG),
        sa.Column("backend_id", STR),
        _need("support_level", STR),
        _need("specialization_state", STR),
        _need("planned_passes", STR),
        _need("applied_passes", STR),
        sa.Column("fallback_reason", TEXT),
        _need("row_count", INT),
        _need("rows_done", INT),
        _need("rows_failed", INT),
        _need("cancel_requested", sa.Boolean(), server_default=sa.false()),
        sa.Column("lease_id", STR),
        sa.Column("lease_expires_ms", BIG),
        sa.Column("worker_id", STR),
        sa.Column("worker_node", STR),
        _need("attempt", INT),
        _need("failures", INT),
        _need("losses", INT),
        _need("declines", INT),
        sa.Column("micro_batch_limit", INT),
        _need("lone_crashes", TEXT),
        sa.Column("reason", TEXT),
        _need("created_ms", BIG),
        _need("available_ms", BIG),
        sa.Column("deadline_ms", BIG),
        _need("queued_ms", BIG),
        sa.Column("started_ms", BIG),
        sa.Column("finished_ms", BIG),
        sa.PrimaryKeyConstraint("id", name="pk_runtime_plans"),
        sa.UniqueConstraint("job_id", "number", name="uq_runtime_plans_job_id_number"),
        sa.UniqueConstraint("lease_id", name="uq_runtime_plans_lease_id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_runtime_plans_job_id_jobs"),
    )


def _plan_history() -> None:
    op.create_table(
        "attempts",
        _need("plan_id", STR),
        _need("number", INT),
        _need("lease_id", STR),
        _need("worker_id", STR),
        _need("worker_node", STR),
        _need("outcome", STR),
        sa.Column("ended_by", STR, comment="the verb that ended it, so that a verb whose reply was lost can be answered again"),
        sa.Column("runtime_plan", TEXT),
        sa.Column("placement", TEXT),
        sa.Column("measured", TEXT),
        _need("started_ms", BIG),
        sa.Column("ended_ms", BIG),
        sa.PrimaryKeyConstraint("plan_id", "number", name="pk_attempts"),
        sa.UniqueConstraint("lease_id", name="uq_attempts_lease_id"),
        sa.ForeignKeyConstraint(["plan_id"], ["runtime_plans.id"], name="fk_attempts_plan_id_runtime_plans"),
    )
    op.create_table(
        "exclusions",
        _need("plan_id", STR),
        _need("node", STR),
        _need("until_ms", BIG),
        _need("is_decline", sa.Boolean()),
        sa.Column("reason", TEXT),
        sa.PrimaryKeyConstraint("plan_id", "node", name="pk_exclusions"),
        sa.ForeignKeyConstraint(["plan_id"], ["runtime_plans.id"], name="fk_exclusions_plan_id_runtime_plans"),
    )
    op.create_table(
        "plan_events",
        _need("id", BIG.with_variant(INT, "sqlite"), autoincrement=True),
        _need("tenant_id", STR),
        _need("job_id", STR),
        _need("plan_id", STR),
        _need("at_ms", BIG),
        _need("kind", STR),
        sa.Column("from_state", STR),
        sa.Column("to_state", STR),
        sa.Column("worker_id", STR),
        sa.Column("worker_node", STR),
        sa.Column("reason", TEXT),
        sa.PrimaryKeyConstraint("id", name="pk_plan_events"),
        comment="append-only: a trigger forbids UPDATE and DELETE",
    )


def _fleet() -> None:
    op.create_table(
        "workers",
        _need("id", STR),
        _need("node", STR),
        _need("state", STR),
        _need("pid", INT),
        _need("slots", INT),
        _need("running", INT),
        _need("capabilities", TEXT),
        _need("live", TEXT),
        _need("devices", TEXT),
        _need("passes", STR),
        _need("device_free_bytes", BIG),
        _need("host_free_bytes", BIG),
        sa.Column("warm_model", TEXT),
        _need("started_ms", BIG),
        _need("heartbeat_ms", BIG),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )
    counters = op.create_table(
        "counters",
        _need("name", STR),
        _need("value", BIG),
        sa.PrimaryKeyConstraint("name", name="pk_counters"),
        comment="class_seq, inventory_seq, and when reaping may go on after an outage",
    )
    names = ("class_seq", "inventory_seq", "reap_from_ms", "reap_held_ms")
    op.bulk_insert(counters, [{"name": name, "value": 0} for name in names])


def _indexes() -> None:
    def partial(name: str, columns: list[str | sa.TextClause], where: str) -> None:
        condition = sa.text(where)
        op.create_index(name, "runtime_plans", columns, postgresql_where=condition, sqlite_where=condition)

    queued, held = "state = 'queued'", "state IN ('leased', 'running')"
    unfinished = "state NOT IN ('cancelled', 'dead', 'expired', 'failed', 'succeeded')"
    op.create_index("ix_jobs_tenant_id_created_ms_id", "jobs", ["tenant_id", "created_ms", "id"])
    op.create_index("ix_job_rows_plan_id_row", "job_rows", ["plan_id", "row"])
    partial("ix_runtime_plans_claim", ["class_id", sa.text("priority DESC"), "created_ms", "number", "id"], queued)
    partial("ix_runtime_plans_stale", ["inventory_seq"], queued)
    partial("ix_runtime_plans_expiring", ["lease_expires_ms"], held)
    partial("ix_runtime_plans_held", ["worker_id"], held)
    partial("ix_runtime_plans_deadline", ["deadline_ms"], f"deadline_ms IS NOT NULL AND {unfinished}")
    op.create_index("ix_plan_events_plan_id_id", "plan_events", ["plan_id", "id"])
    op.create_index("ix_plan_events_job_id_id", "plan_events", ["job_id", "id"])
    op.create_index("ix_workers_state", "workers", ["state"])


def _append_only_events() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER plan_events_no_{verb.lower()} BEFORE {verb} ON plan_events "
                "BEGIN SELECT RAISE(ABORT, 'plan_events is append-only'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION plan_events_are_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'plan_events is append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER plan_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON plan_events "
        "FOR EACH STATEMENT EXECUTE FUNCTION plan_events_are_append_only()"
    )


PLAN_STATES = """
CREATE VIEW plan_states AS
SELECT id AS plan_id, job_id, model, state AS execution_state,
       CASE WHEN state = 'queued' THEN condition END AS condition,
       backend_id, support_level, specialization_state, planned_passes, applied_passes, fallback_reason,
       worker_node, attempt, row_count AS rows_total, rows_done, rows_failed,
       queued_ms AS queued_at, started_ms AS started_at, finished_ms AS finished_at, tenant_id
FROM runtime_plans
"""
WORKER_FLEET = """
CREATE VIEW worker_fleet AS
SELECT w.id AS worker_id, w.node, w.state, w.devices, w.device_free_bytes, w.host_free_bytes, w.passes, w.warm_model,
       (SELECT count(*) FROM runtime_plans p WHERE p.worker_id = w.id AND p.state IN ('leased', 'running')) AS running_plans,
       {now} - w.heartbeat_ms AS heartbeat_age_ms
FROM workers w
"""
JOB_PROGRESS = """
CREATE VIEW job_progress AS
SELECT j.id AS job_id,
       CASE WHEN p.unfinished = 0 AND p.cancelled > 0 THEN 'cancelled'
            WHEN p.unfinished = 0 AND p.expired > 0 THEN 'expired'
            WHEN p.unfinished = 0 AND p.failed > 0 THEN 'failed'
            WHEN p.unfinished = 0 THEN 'succeeded'
            WHEN p.queued = p.plans THEN 'queued'
            ELSE 'running' END AS state,
       j.row_count AS rows_total, j.succeeded AS rows_succeeded, j.failed AS rows_failed,
       j.row_count - j.succeeded - j.failed AS rows_pending,
       j.prompt_tokens, j.completion_tokens,
       CASE WHEN p.started IS NOT NULL THEN
            1000.0 * j.completion_tokens
            / (CASE WHEN p.unfinished = 0 AND p.finished > p.started THEN p.finished - p.started
                    WHEN {now} > p.started THEN {now} - p.started ELSE 1 END)
            END AS tokens_per_second,
       j.created_ms AS created_at, j.tenant_id
FROM jobs j JOIN (
    SELECT job_id, count(*) AS plans, min(started_ms) AS started, max(finished_ms) AS finished,
           sum(CASE WHEN state IN ('queued', 'leased', 'running') THEN 1 ELSE 0 END) AS unfinished,
           sum(CASE WHEN state = 'queued' THEN 1 ELSE 0 END) AS queued,
           sum(CASE WHEN state = 'cancelled' THEN 1 ELSE 0 END) AS cancelled,
           sum(CASE WHEN state = 'expired' THEN 1 ELSE 0 END) AS expired,
           sum(CASE WHEN state IN ('failed', 'dead') THEN 1 ELSE 0 END) AS failed
    FROM runtime_plans GROUP BY job_id
) p ON p.job_id = j.id
"""
VIEWS = ("plan_states", "worker_fleet", "job_progress")


def _views() -> None:
    now = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"
    if op.get_bind().dialect.name == "sqlite":
        now = "CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER)"
    for statement in (PLAN_STATES, WORKER_FLEET, JOB_PROGRESS):
        op.execute(statement.replace("{now}", now))


def _reader() -> None:
    """A role that may read the views and nothing else, where PostgreSQL lets us make one."""
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute(
        """
        DO $$ BEGIN
            CREATE ROLE ollm_reader NOLOGIN;
        EXCEPTION WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
        END $$
        """
    )
    op.execute(
        f"""
        DO $$ BEGIN
            IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'ollm_reader') THEN
                EXECUTE format('GRANT USAGE ON SCHEMA %I TO ollm_reader', current_schema());
                GRANT SELECT ON {", ".join(VIEWS)} TO ollm_reader;
            END IF;
        EXCEPTION WHEN insufficient_privilege THEN NULL;
        END $$
        """
    )


def downgrade() -> None:
    for view in VIEWS:
        op.execute(f"DROP VIEW {view}")
    tables = (
        ("counters", "workers", "plan_events", "exclusions", "attempts", "runtime_plans"),
        ("plan_classes", "results", "job_rows", "jobs"),
    )
    for name in (*tables[0], *tables[1]):
        op.drop_table(name)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION plan_events_are_append_only()")
