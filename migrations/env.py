"""In which connection do migrations run? The one that `ollm_service.store.schema.upgrade` hands over, in its transaction."""

from alembic import context
from sqlalchemy import text

from ollm_service.store.tables import metadata

connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    # A migration that waits for a lock holds up everybody behind it: rather give up and be run again.
    connection.execute(text("SET LOCAL lock_timeout = '10s'"))
    connection.execute(text("SET LOCAL statement_timeout = '10min'"))
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=False)
context.run_migrations()
