"""How did the schema come to be what it is? One module a step, run by Alembic."""
