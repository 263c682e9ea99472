"""A running evaluation has an estimate of the time that it still takes."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("evaluations", sa.Column("seconds_left", sa.Double(), nullable=True))
