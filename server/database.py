"""The connection to PostgreSQL, and the schema that it must have."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import alembic.command
import alembic.config
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

MIGRATIONS = Path(__file__).parent / "migrations"
Sessions = async_sessionmaker[AsyncSession]


@contextlib.asynccontextmanager
async def connected(url: str, size: int = 10) -> AsyncIterator[Sessions]:
    """Sessions on the database `url` (SQLAlchemy's form); a connection that PostgreSQL has dropped is replaced.

    An error does not show a statement's values: a run's row holds secrets, and errors go into logs.
    """
    engine: AsyncEngine = create_async_engine(
        url, pool_size=size, max_overflow=size, pool_pre_ping=True, pool_timeout=20, hide_parameters=True
    )
    try:
        yield async_sessionmaker(engine, expire_on_commit=False)
    finally:
        await engine.dispose()


def reading(sessions: Sessions) -> Sessions:
    """Sessions on the same connections in which each statement stands for itself."""
    engine = sessions.kw["bind"]
    return async_sessionmaker(engine.execution_options(isolation_level="AUTOCOMMIT"), expire_on_commit=False)


def migrate(url: str, revision: str = "head") -> None:
    """Brings the schema to `revision`. Several machines may do so at once: a lock in the database orders them."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = sqlalchemy.create_engine(url)
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(7310)"))
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, revision)
            connection.commit()
    finally:
        engine.dispose()
