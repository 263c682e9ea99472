"""The tables of version 1, which servers created before there were migrations."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# SQLite generates ids only for a key that is declared as INTEGER
ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _create_version()
    _create_support_sets()
    _create_media()
    _create_derived()
    _create_evaluations()


def _create_version() -> None:
    table = op.create_table(
        "schema_version",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("version", sa.Integer(), nullable=False),
    )
    op.bulk_insert(table, [{"id": 1, "version": 1}])


def _create_support_sets() -> None:
    op.create_table(
        "support_sets",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(128), unique=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), index=True),
        sa.Column("is_pinned", sa.Boolean(), nullable=False),
        sa.Column("next_place", sa.Integer(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
    )
    op.create_table(
        "support_set_versions",
        sa.Column("set_id", sa.String(64), sa.ForeignKey("support_sets.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("num_examples", sa.Integer(), nullable=False),
        sa.Column("num_added", sa.Integer(), nullable=False),
        sa.Column("num_replaced", sa.Integer(), nullable=False),
        sa.Column("num_removed", sa.Integer(), nullable=False),
    )
    op.create_table(
        "examples",
        sa.Column("row_id", ROW_ID, primary_key=True),
        sa.Column("set_id", sa.String(64), sa.ForeignKey("support_sets.id", ondelete="CASCADE"), nullable=False),
        sa.Column("example_id", sa.String(128), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("first_version", sa.Integer(), nullable=False),
        sa.Column("end_version", sa.Integer()),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("question", sa.String(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
    )
    op.create_index("ix_examples_by_place", "examples", ["set_id", "place"])
    op.create_index("ix_examples_by_id", "examples", ["set_id", "example_id", "first_version"], unique=True)
    op.create_table(
        "first_answers",
        sa.Column("scope", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(256), primary_key=True),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False, index=True),
    )


def _create_media() -> None:
    op.create_table(
        "media",
        sa.Column("media_id", sa.String(80), primary_key=True),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("is_uploaded", sa.Boolean(), nullable=False),
    )
    op.create_table(
        "example_media",
        sa.Column("row_id", ROW_ID, sa.ForeignKey("examples.row_id", ondelete="CASCADE"), primary_key=True),
        sa.Column("place", sa.Integer(), primary_key=True),
        sa.Column("media_id", sa.String(80), sa.ForeignKey("media.media_id"), nullable=False),
    )
    op.create_index("ix_example_media_by_media", "example_media", ["media_id"])
    op.create_table(
        "media_leases",
        sa.Column("holder", sa.String(64), primary_key=True),
        sa.Column("media_id", sa.String(80), sa.ForeignKey("media.media_id"), primary_key=True, index=True),
        sa.Column("expires_at", sa.Double(), nullable=False),
    )


def _create_derived() -> None:
    op.create_table(
        "embeddings",
        sa.Column("key", sa.String(128), primary_key=True),
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False, index=True),
    )
    op.create_table(
        "fits",
        sa.Column("set_id", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("method", sa.String(32), primary_key=True),
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("format", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("arrays", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False, index=True),
        sa.ForeignKeyConstraint(
            ["set_id", "version"],
            ["support_set_versions.set_id", "support_set_versions.version"],
            ondelete="CASCADE",
        ),
    )


def _create_evaluations() -> None:
    op.create_table(
        "evaluations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("support_set", sa.String(64), nullable=False, index=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False, index=True),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("queries_done", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double()),
        sa.Column("finished_at", sa.Double()),
        sa.Column("error", sa.JSON()),
        sa.Column("holder", sa.String(64), nullable=False),
        sa.Column("held_until", sa.Double(), nullable=False),
    )
    op.create_table(
        "evaluation_cells",
        sa.Column(
            "evaluation_id", sa.String(64), sa.ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("place", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("result", sa.JSON(), nullable=False),
    )
