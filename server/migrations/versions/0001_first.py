"""The first schema: accounts, models, runs, files, workers, and Procrastinate's tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None


def upgrade() -> None:
    now: dict[str, Any] = {"server_default": sa.func.now(), "nullable": False}
    moment = sa.DateTime(timezone=True)
    account = lambda **options: sa.Column(  # noqa: E731
        "account_id", sa.Integer, sa.ForeignKey("accounts.id", ondelete="CASCADE"), **options
    )
    op.create_table(
        "accounts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(63), nullable=False, unique=True),
        sa.Column("webhook_secret", sa.String(100), nullable=False),
        sa.Column("created_at", moment, **now),
    )
    op.create_table(
        "tokens",
        sa.Column("digest", sa.String(64), primary_key=True),
        account(nullable=False),
        sa.Column("hint", sa.String(12), nullable=False),
        sa.Column("created_at", moment, **now),
        sa.Column("revoked_at", moment),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("value", sa.String(200), nullable=False),
    )
    _create_models(account, moment, now)
    _create_runs(account(nullable=False), moment, now)
    op.create_table(
        "workers",
        sa.Column("name", sa.String(127), primary_key=True),
        sa.Column("hardware", sa.String(127), nullable=False),
        sa.Column("doing", sa.String(40), nullable=False, server_default=""),
        sa.Column("started_at", moment, **now),
        sa.Column("seen_at", moment, **now),
    )
    # Procrastinate's schema of the version that this migration was written with: what later versions of it change
    # comes as a migration of its own.
    schema = (Path(__file__).parent.parent / "procrastinate-3.10.sql").read_text(encoding="utf-8")
    driver = op.get_bind().connection.driver_connection
    assert driver is not None
    driver.execute(schema)


def _create_models(account: "Callable[..., sa.Column[int]]", moment: sa.DateTime, now: dict[str, Any]) -> None:
    op.create_table(
        "models",
        sa.Column("id", sa.Integer, primary_key=True),
        account(nullable=True),
        sa.Column("owner", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("visibility", sa.String(10), nullable=False),
        sa.Column("hardware", sa.String(63), nullable=False, server_default=""),
        *(
            sa.Column(name, sa.Text)
            for name in ("description", "github_url", "paper_url", "license_url", "cover_image_url")
        ),
        sa.Column("run_count", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("created_at", moment, **now),
        sa.UniqueConstraint("owner", "name"),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.String(26), primary_key=True),
        account(nullable=False),
        sa.Column("run_id", sa.String(26)),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("content_type", sa.String(127), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("details", JSONB, nullable=False),
        sa.Column("created_at", moment, **now),
        sa.Column("expires_at", moment),
    )
    op.create_index("files_by_account", "files", ["account_id", "created_at", "id"])
    op.create_index("files_by_run", "files", ["run_id"])
    op.create_table(
        "versions",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("model_id", sa.Integer, sa.ForeignKey("models.id", ondelete="CASCADE"), nullable=False),
        sa.Column("cog", sa.String(20), nullable=False),
        sa.Column("cog_version", sa.String(20), nullable=False),
        sa.Column("openapi_schema", JSONB, nullable=False),
        sa.Column("weights", sa.String(26), sa.ForeignKey("files.id", ondelete="SET NULL")),
        sa.Column("run_id", sa.String(26), unique=True),
        sa.Column("created_at", moment, **now),
        sa.UniqueConstraint("model_id", "id"),
    )
    op.create_index("versions_by_model", "versions", ["model_id", "created_at"])


def _create_runs(account: "sa.Column[int]", moment: sa.DateTime, now: dict[str, Any]) -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.String(26), primary_key=True),
        sa.Column("kind", sa.String(10), nullable=False),
        account,
        sa.Column("model", sa.String(130), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("cog", sa.String(20), nullable=False),
        sa.Column("destination", sa.String(130)),
        sa.Column("input", JSONB, nullable=False),
        sa.Column("secrets", JSONB, nullable=False),
        sa.Column("weights", JSONB, nullable=False),
        sa.Column("output", JSONB),
        sa.Column("status", sa.String(10), nullable=False, server_default="starting"),
        sa.Column("error", sa.Text),
        sa.Column("logs", sa.Text, nullable=False, server_default=""),
        sa.Column("metrics", JSONB, nullable=False),
        sa.Column("webhook", sa.Text),
        sa.Column("webhook_events", JSONB, nullable=False),
        sa.Column("source", sa.String(10), nullable=False, server_default="api"),
        sa.Column("base_url", sa.Text, nullable=False),
        sa.Column("created_at", moment, **now),
        sa.Column("started_at", moment),
        sa.Column("completed_at", moment),
        sa.Column("deadline", moment),
        sa.Column("data_removed", sa.Boolean, nullable=False, server_default="false"),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("body_digest", sa.String(64), nullable=False),
        sa.Column("job_id", sa.BigInteger),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("claim", sa.String(32)),
        sa.UniqueConstraint("account_id", "idempotency_key"),
    )
    op.create_index("runs_by_account", "runs", ["account_id", "kind", "created_at", "id"])
    op.create_index("runs_open", "runs", ["status"], postgresql_where=sa.text("status IN ('starting', 'processing')"))


def downgrade() -> None:
    raise NotImplementedError("there is nothing before the first schema; restore a backup instead")
