"""An evaluation counts the servers that ended while they ran it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("evaluations", sa.Column("interruptions", sa.Integer(), nullable=False, server_default="0"))
