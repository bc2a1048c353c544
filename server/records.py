"""What the database holds. Every row but the server's own two models belongs to an account."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, ForeignKey, Index, String, Text, UniqueConstraint, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

OPEN = ("starting", "processing")
FINAL = ("succeeded", "failed", "canceled")
"""Replicate's words: its clients know no other."""
DRAFT_DAYS = 7
"""Then pictures that were put together on the page and not trained on are deleted."""

Json = dict[str, Any]


class Record(DeclarativeBase):
    type_annotation_map = {Json: JSONB, list[str]: JSONB, datetime: DateTime(timezone=True)}  # noqa: RUF012


class Account(Record):
    __tablename__ = "accounts"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    """The owner of `owner/model`."""
    webhook_secret: Mapped[str] = mapped_column(String(100))
    """whsec_ and the key in base64, with which this account's webhooks are signed."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Token(Record):
    __tablename__ = "tokens"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256 of the token, which has 160 random bits; the token itself is nowhere."""
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    hint: Mapped[str] = mapped_column(String(12))
    """Its first characters, to tell one from another."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    revoked_at: Mapped[datetime | None]


class Secret(Record):
    """What all machines of the server must share: the key that signs links."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    value: Mapped[str] = mapped_column(String(200))


class Model(Record):
    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("owner", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int | None] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    """None: one of the server's own models, which everybody may use."""
    owner: Mapped[str] = mapped_column(String(63))
    name: Mapped[str] = mapped_column(String(63))
    visibility: Mapped[str] = mapped_column(String(10))
    """private, or public: other accounts may look at it and draw with it."""
    hardware: Mapped[str] = mapped_column(String(63), server_default="")
    description: Mapped[str | None] = mapped_column(Text)
    github_url: Mapped[str | None] = mapped_column(Text)
    paper_url: Mapped[str | None] = mapped_column(Text)
    license_url: Mapped[str | None] = mapped_column(Text)
    cover_image_url: Mapped[str | None] = mapped_column(Text)
    run_count: Mapped[int] = mapped_column(BigInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Version(Record):
    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("model_id", "id"), Index("versions_by_model", "model_id", "created_at"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    cog: Mapped[str] = mapped_column(String(20))
    """Which of this repository's Cog models runs it: `server.cog.MODELS`."""
    cog_version: Mapped[str] = mapped_column(String(20))
    openapi_schema: Mapped[Json]
    weights: Mapped[str | None] = mapped_column(ForeignKey("files.id", ondelete="SET NULL"))
    """The LoRA that it draws with, as a training's tar."""
    run_id: Mapped[str | None] = mapped_column(String(26), unique=True)
    """The training that published it; a training publishes once."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Run(Record):
    """A training or a prediction."""

    __tablename__ = "runs"
    __table_args__ = (
        UniqueConstraint("account_id", "idempotency_key"),
        Index("runs_by_account", "account_id", "kind", "created_at", "id"),
        Index("runs_open", "status", postgresql_where="status IN ('starting', 'processing')"),
        Index("runs_by_tag", "tags", postgresql_using="gin"),
    )

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    """training or prediction."""
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    model: Mapped[str] = mapped_column(String(130))
    """owner/name, as it was called; a run outlives its model."""
    version: Mapped[str] = mapped_column(String(64))
    cog: Mapped[str] = mapped_column(String(20))
    destination: Mapped[str | None] = mapped_column(String(130))
    input: Mapped[Json]
    """As it was sent, with files as {"$file": id} and secrets hidden."""
    secrets: Mapped[Json]
    """Inputs that must not be seen, such as tokens of other services; empty when the run has ended."""
    weights: Mapped[Json]
    """Inputs that name a LoRA of this server: its file's id by the input's name."""
    output: Mapped[Any] = mapped_column(JSONB, nullable=True)
    status: Mapped[str] = mapped_column(String(10), server_default="starting")
    error: Mapped[str | None] = mapped_column(Text)
    logs: Mapped[str] = mapped_column(Text, server_default="")
    metrics: Mapped[Json]
    webhook: Mapped[str | None] = mapped_column(Text)
    webhook_events: Mapped[list[str]]
    source: Mapped[str] = mapped_column(String(10), server_default="api")
    base_url: Mapped[str] = mapped_column(Text)
    """The server's address as its caller knows it; links in webhooks start with it."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    deadline: Mapped[datetime | None]
    data_removed: Mapped[bool] = mapped_column(server_default="false")
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    body_digest: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the request: the same key with another body is a mistake."""
    job_id: Mapped[int | None] = mapped_column(BigInteger)
    """Its job in Procrastinate's table."""
    attempts: Mapped[int] = mapped_column(server_default="0")
    claim: Mapped[str | None] = mapped_column(String(32))
    """Who may write to it: a worker's random word, new with each attempt. A worker that was given up writes nothing."""
    tags: Mapped[list[str]] = mapped_column(server_default="[]")
    """Its caller's words for what it belongs to, such as a campaign."""
    token: Mapped[str | None] = mapped_column(String(64))
    """The digest of the token that asked for it."""


class Use(Record):
    """What a run that has ended used. It stays when the run is deleted, so that quotas and reports stay true."""

    __tablename__ = "uses"
    __table_args__ = (Index("uses_by_account", "account_id", "created_at"),)

    run_id: Mapped[str] = mapped_column(String(26), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    token: Mapped[str | None] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(10))
    model: Mapped[str] = mapped_column(String(130))
    """A training's destination, a prediction's model."""
    tags: Mapped[list[str]]
    pictures: Mapped[int]
    gpu_seconds: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Refusal(Record):
    """A request that a rule of the guardrails refused."""

    __tablename__ = "refusals"
    __table_args__ = (Index("refusals_by_account", "account_id", "created_at"),)

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    token: Mapped[str | None] = mapped_column(String(64))
    rule: Mapped[str] = mapped_column(String(100))
    detail: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(String(130))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Draft(Record):
    """The pictures that somebody has put together on the page and not trained on yet. Its files say so themselves."""

    __tablename__ = "drafts"

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    look: Mapped[Json]
    """What `script.look` told of them."""
    captions: Mapped[Json]
    """As mended by hand, by the picture's name."""
    removed: Mapped[list[str]]
    """Names of pictures that are not to be trained on."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class File(Record):
    __tablename__ = "files"
    __table_args__ = (Index("files_by_account", "account_id", "created_at", "id"), Index("files_by_run", "run_id"))

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    run_id: Mapped[str | None] = mapped_column(String(26))
    """The run that it was sent with or made by; None for an upload."""
    name: Mapped[str] = mapped_column(String(255))
    content_type: Mapped[str] = mapped_column(String(127))
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    details: Mapped[Json]
    """The caller's own metadata."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]


class Worker(Record):
    """A worker as it last reported; the live ones are this server's hardware."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(127), primary_key=True)
    hardware: Mapped[str] = mapped_column(String(127))
    doing: Mapped[str] = mapped_column(String(40), server_default="")
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
