"""What quotes are made of: which model an attempt ran, and the previews that a submission may name."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "attempts", sa.Column("model_digest", sa.String(), comment="what it ran; NULL where the plan could not be read")
    )
    op.add_column("jobs", sa.Column("quoted", sa.Text(), comment="what its preview said of its time; NULL without one"))
    op.create_index("ix_attempts_model_digest_ended_ms", "attempts", ["model_digest", "ended_ms"])
    op.create_table(
        "previews",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False, comment="what was asked for, without its rows"),
        sa.Column("planned", sa.Text(), nullable=False),
        sa.Column("requirements", sa.Text(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_previews"),
    )
    op.create_index("ix_previews_created_ms", "previews", ["created_ms"])


def downgrade() -> None:
    op.drop_table("previews")
    op.drop_index("ix_attempts_model_digest_ended_ms", "attempts")
    op.drop_column("attempts", "model_digest")
    op.drop_column("jobs", "quoted")
