"""The server's settings, read from the environment once and handed on as values."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server import guardrails
from server.guardrails import Rule

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a machine of the fleet is told. API and workers need the same database, storage and limits."""

    data: Path
    """Folder for all that this machine keeps: the embedded database, files, downloaded LoRAs, what Cog works in."""
    database_url: str
    """postgresql://user:password@host/name; empty: a PostgreSQL embedded in `data`."""
    storage_url: str
    """Where files lie: file:///folder, s3://bucket/prefix, gs:// or az://."""
    public_url: str
    """The address that callers use, without /v1; empty: that of each request."""
    allow_private: bool
    """Whether inputs and webhooks may name private addresses: only for machines whose callers are all trusted."""
    retention_days: float
    """Days after which a finished run's pictures, captions, outputs and logs are deleted; 0 keeps them."""
    link_seconds: int
    """How long a signed link is good for."""
    requests_a_minute: int
    """For each token."""
    open_jobs: int
    """Trainings and predictions of one account that may wait or run at once."""
    body_bytes: int
    """The largest JSON request, data URIs included."""
    file_bytes: int
    """The largest file: uploaded, or fetched for an input."""
    attempts: int
    """How often a run is begun that loses its worker, its Cog server or its machine."""
    lost_seconds: float
    """A worker is lost that has not been heard of for so long; it reports every two seconds."""

    rules: tuple[Rule, ...]
    """The guardrails: GUARDRAILS names the file."""

    @property
    def reports(self) -> Path:
        """Folder for reports and previews that somebody has looked at, for a day: they show what was trained on."""
        return self.data / "reports"

    @property
    def inside(self) -> str:
        """The database's address for SQLAlchemy."""
        return self.database_url.replace("postgres://", "postgresql://", 1).replace(
            "postgresql://", "postgresql+psycopg://", 1
        )


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """Raises ValueError that names a variable whose value cannot be read."""
    data = Path(environ.get("SERVER_DATA") or ROOT / ".server").resolve()
    return Settings(
        data=data,
        database_url=environ.get("DATABASE_URL", ""),
        storage_url=environ.get("STORAGE_URL") or f"file://{data}/files",
        public_url=environ.get("PUBLIC_URL", "").rstrip("/").removesuffix("/v1"),
        allow_private=_number(environ, "ALLOW_PRIVATE_ADDRESSES", 0) > 0,
        retention_days=_number(environ, "RETENTION_DAYS", 30),
        link_seconds=int(_number(environ, "LINK_SECONDS", 3600)),
        requests_a_minute=int(_number(environ, "REQUESTS_A_MINUTE", 3000, least=1)),
        open_jobs=int(_number(environ, "OPEN_JOBS", 100, least=1)),
        body_bytes=int(_number(environ, "MAX_BODY_MIB", 64) * MIB),
        file_bytes=int(_number(environ, "MAX_FILE_MIB", 2048) * MIB),
        attempts=int(_number(environ, "ATTEMPTS", 3, least=1)),
        lost_seconds=_number(environ, "LOST_SECONDS", 20, least=5),
        rules=guardrails.read(Path(environ["GUARDRAILS"])) if environ.get("GUARDRAILS") else (),
    )


def _number(environ: Mapping[str, str], name: str, default: float, least: float = 0) -> float:
    text = environ.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1
    if not least <= value < 1e9:
        raise ValueError(f"{name}={text[:40]!r} must be a number from {least} up")
    return value
