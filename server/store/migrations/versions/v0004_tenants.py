"""Keys, support sets and evaluations have a tenant; names and media ids have room for it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

LONGER = {
    ("support_sets", "name"): 192,
    ("media", "media_id"): 128,
    ("example_media", "media_id"): 128,
    ("media_leases", "media_id"): 128,
}


def upgrade() -> None:
    for table in ("api_keys", "support_sets", "evaluations"):
        op.add_column(table, sa.Column("tenant", sa.String(48), nullable=False, server_default=""))
    for table in ("support_sets", "evaluations"):
        op.create_index(f"ix_{table}_tenant", table, ["tenant"])
    if op.get_context().dialect.name != "sqlite":  # which has no lengths
        for (table, column), length in LONGER.items():
            op.alter_column(table, column, type_=sa.String(length))
