"""The migrations of the database: `versions` has a file per version of the tables, which Alembic runs in order."""
