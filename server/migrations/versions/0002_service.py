"""Tags and tokens of runs, what each run used, refusals by the guardrails, and pictures that wait for a training."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    moment = sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False)
    account = sa.Column("account_id", sa.Integer, sa.ForeignKey("accounts.id", ondelete="CASCADE"), nullable=False)
    op.add_column("runs", sa.Column("tags", JSONB, server_default="[]", nullable=False))
    op.add_column("runs", sa.Column("token", sa.String(64)))
    op.create_index("runs_by_tag", "runs", ["tags"], postgresql_using="gin")
    op.create_table(
        "uses",
        sa.Column("run_id", sa.String(26), primary_key=True),
        account.copy(),
        sa.Column("token", sa.String(64)),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("model", sa.String(130), nullable=False),
        sa.Column("tags", JSONB, nullable=False),
        sa.Column("pictures", sa.Integer, nullable=False),
        sa.Column("gpu_seconds", sa.Float, nullable=False),
        moment.copy(),
    )
    op.create_index("uses_by_account", "uses", ["account_id", "created_at"])
    op.create_table(
        "refusals",
        sa.Column("id", sa.BigInteger, primary_key=True),
        account.copy(),
        sa.Column("token", sa.String(64)),
        sa.Column("rule", sa.String(100), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("model", sa.String(130), nullable=False),
        moment.copy(),
    )
    op.create_index("refusals_by_account", "refusals", ["account_id", "created_at"])
    op.create_table(
        "drafts",
        sa.Column("id", sa.String(26), primary_key=True),
        account.copy(),
        sa.Column("look", JSONB, nullable=False),
        sa.Column("captions", JSONB, nullable=False),
        sa.Column("removed", JSONB, nullable=False),
        moment.copy(),
    )
