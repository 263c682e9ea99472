"""The tables of support sets. An example's row says in which versions it stands, so a version costs what it changes.

Version n of a set holds the rows with `first_version <= n` that were not ended by then (`end_version`, exclusive). Rows
are never changed but for that end. Media are referred to, and held by those references: a row that is referred to, or
leased by a request about to refer to it, cannot go, nor can its bytes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from server.store.database import Base

# SQLite counts rows by itself only where the key is plainly INTEGER
RowId = BigInteger().with_variant(Integer(), "sqlite")


class SupportSetRow(Base):
    """`version` is the latest; times are in Unix seconds, none: never."""

    __tablename__ = "support_sets"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str | None] = mapped_column(String(128), unique=True)
    version: Mapped[int]
    created_at: Mapped[float]
    updated_at: Mapped[float]
    expires_at: Mapped[float | None] = mapped_column(index=True)
    is_pinned: Mapped[bool]
    # place of the next new example
    next_place: Mapped[int]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)


class VersionRow(Base):
    """What a version holds, counted once when it was made."""

    __tablename__ = "support_set_versions"

    set_id: Mapped[str] = mapped_column(ForeignKey("support_sets.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    num_examples: Mapped[int]
    num_added: Mapped[int]
    num_replaced: Mapped[int]
    num_removed: Mapped[int]


class ExampleRow(Base):
    __tablename__ = "examples"
    __table_args__ = (
        Index("ix_examples_by_place", "set_id", "place"),
        Index("ix_examples_by_id", "set_id", "example_id", "first_version", unique=True),
    )

    row_id: Mapped[int] = mapped_column(RowId, primary_key=True)
    set_id: Mapped[str] = mapped_column(ForeignKey("support_sets.id", ondelete="CASCADE"))
    example_id: Mapped[str] = mapped_column(String(128))
    # the order in a set; an example that replaces another takes its place
    place: Mapped[int]
    first_version: Mapped[int]
    end_version: Mapped[int | None]
    text: Mapped[str]
    question: Mapped[str]
    label: Mapped[str]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)


class MediaRow(Base):
    """One media of the store. `is_uploaded`: a client stored it by itself and will delete it by itself; other media came
    with support sets and go with their last reference."""

    __tablename__ = "media"

    media_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    is_uploaded: Mapped[bool]


class ExampleMediaRow(Base):
    """`place`: of the media within its example."""

    __tablename__ = "example_media"
    __table_args__ = (Index("ix_example_media_by_media", "media_id"),)

    row_id: Mapped[int] = mapped_column(RowId, ForeignKey("examples.row_id", ondelete="CASCADE"), primary_key=True)
    place: Mapped[int] = mapped_column(primary_key=True)
    media_id: Mapped[str] = mapped_column(String(80), ForeignKey("media.media_id"))


class LeaseRow(Base):
    """A media that a request under way is about to refer to. An expired lease holds nothing."""

    __tablename__ = "media_leases"

    holder: Mapped[str] = mapped_column(String(64), primary_key=True)
    media_id: Mapped[str] = mapped_column(String(80), ForeignKey("media.media_id"), primary_key=True, index=True)
    expires_at: Mapped[float]


class IdempotencyRow(Base):
    """What a request with an `Idempotency-Key` was answered, for when it comes again. `scope`: what it would change."""

    __tablename__ = "first_answers"

    scope: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    answer: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(index=True)


class EmbeddingRow(Base):
    """`key`: a media's id or the digest of a text; `model`: the fingerprint of the weights that embedded it."""

    __tablename__ = "embeddings"

    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    model: Mapped[str] = mapped_column(String(128), primary_key=True)
    vector: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[float] = mapped_column(index=True)
