"""An evaluation has the client that created it, so that servers of one database count its share together."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("evaluations", sa.Column("client", sa.String(128), nullable=False, server_default=""))
    # servers from before the migrations read this number, and refuse a database with a higher one than 1
    op.execute("UPDATE schema_version SET version = 2")
