"""Runs the migrations on the connection that `server.store.schema` passes, within its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
