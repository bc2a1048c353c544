"""The schema: what migrations make is what the code believes in, and an old database comes up to date with its rows."""

import os
import signal
import tempfile
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from server import database, postgres
from server.records import Record
from tests.server.conftest import Served


def test_an_old_database_is_brought_up_to_date_with_its_rows(served: Served) -> None:
    with psycopg.connect(served.database, autocommit=True) as connection:
        connection.execute("CREATE DATABASE old")
    old = served.database.replace("postgresql://", "postgresql+psycopg://").replace("/postgres?", "/old?")
    database.migrate(old, "0001")
    engine = sa.create_engine(old)
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO accounts (id, name, webhook_secret) VALUES (1, 'you', 'whsec_')"))
        connection.execute(
            sa.text(
                "INSERT INTO runs (id, kind, account_id, model, version, cog, input, secrets, weights, metrics,"
                " webhook_events, base_url, body_digest) VALUES"
                " ('a', 'training', 1, 'o/m', 'v', 'trainer', '{}', '{}', '{}', '{}', '[]', '', '')"
            )
        )
    database.migrate(old)
    database.migrate(old)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT status FROM runs")).scalars().all() == ["starting"]
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = [d for d in compare_metadata(context, Record.metadata) if "procrastinate" not in str(d)]
        assert differences == []
    engine.dispose()


@pytest.mark.slow
def test_a_postgres_that_was_killed_is_begun_again() -> None:
    with tempfile.TemporaryDirectory(prefix="flux-postgres-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "postgres"
        address = postgres.start(path)
        try:
            with psycopg.connect(address) as connection:
                connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
            os.kill(int((path / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
            with psycopg.connect(postgres.start(path)) as connection:
                assert connection.execute("SELECT number FROM kept").fetchall() == [(7,)]
        finally:
            postgres.stop(path)
