"""Which models are to be fetched from the hub, by whom, and how far is that?"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "downloads",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("reference", sa.String(), nullable=False, comment="org/name or org/name@revision"),
        sa.Column("repo_id", sa.String(), nullable=False),
        sa.Column("revision", sa.String()),
        sa.Column("folder", sa.String(), nullable=False, comment="of the models root"),
        sa.Column("target", sa.String(), nullable=False, comment="the node that was asked for; empty: any"),
        sa.Column("nodes", sa.Text(), comment="the nodes that may take it; NULL: any"),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("lease_id", sa.String()),
        sa.Column("lease_expires_ms", sa.BigInteger()),
        sa.Column("worker_id", sa.String()),
        sa.Column("worker_node", sa.String()),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False, comment="without a new byte"),
        sa.Column("losses", sa.Integer(), nullable=False, comment="without a new byte"),
        sa.Column("commit_id", sa.String(), comment="what the revision meant when it began"),
        sa.Column("bytes_done", sa.BigInteger(), nullable=False),
        sa.Column("bytes_total", sa.BigInteger()),
        sa.Column("reason", sa.Text()),
        sa.Column("is_everywhere", sa.Boolean(), nullable=False, comment="whether it would fail on any worker"),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("available_ms", sa.BigInteger(), nullable=False),
        sa.Column("started_ms", sa.BigInteger()),
        sa.Column("finished_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_downloads"),
        sa.UniqueConstraint("lease_id", name="uq_downloads_lease_id"),
    )
    op.create_index("ix_downloads_created_ms", "downloads", ["created_ms"])
    under_way = sa.text("state IN ('queued', 'running')")
    op.create_index(
        "uq_downloads_active",
        "downloads",
        ["reference", "folder", "target"],
        unique=True,
        postgresql_where=under_way,
        sqlite_where=under_way,
    )


def downgrade() -> None:
    op.drop_table("downloads")
