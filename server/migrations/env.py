"""Alembic's entry: runs migrations on the connection that `server.database.migrate` hands over."""

from alembic import context

from server.records import Record

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Record.metadata, compare_type=True)
context.run_migrations()
