"""The tables of support sets. A row of an example covers a range of versions, so a version costs only its changes.

Version n of a set holds the rows with `first_version <= n` that had not ended by then (`end_version`, exclusive). No
other column of a row changes. A media row that is referred to, or leased by a request that is about to refer to it,
cannot be deleted, and neither can its bytes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from server.store.database import Base

# SQLite generates ids only for a key that is declared as INTEGER
RowId = BigInteger().with_variant(Integer(), "sqlite")


class SupportSetRow(Base):
    """A support set. `version` is the latest; times are in Unix seconds, and null means never."""

    __tablename__ = "support_sets"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str | None] = mapped_column(String(128), unique=True)
    version: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]
    updated_at: Mapped[float]
    expires_at: Mapped[float | None] = mapped_column(index=True)
    is_pinned: Mapped[bool]
    # the position of the next new example
    next_position: Mapped[int] = mapped_column("next_place", default=0)
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)


class VersionRow(Base):
    """A version of a set, with numbers of examples counted when it was created."""

    __tablename__ = "support_set_versions"

    set_id: Mapped[str] = mapped_column(ForeignKey("support_sets.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    num_examples: Mapped[int]
    num_added: Mapped[int] = mapped_column(default=0)
    num_replaced: Mapped[int] = mapped_column(default=0)
    num_removed: Mapped[int] = mapped_column(default=0)


class ExampleRow(Base):
    """An example in the versions from `first_version` up to, but not including, `end_version` (null: all later ones)."""

    __tablename__ = "examples"
    __table_args__ = (
        Index("ix_examples_by_place", "set_id", "place"),
        Index("ix_examples_by_id", "set_id", "example_id", "first_version", unique=True),
    )

    row_id: Mapped[int] = mapped_column(RowId, primary_key=True)
    set_id: Mapped[str] = mapped_column(ForeignKey("support_sets.id", ondelete="CASCADE"))
    example_id: Mapped[str] = mapped_column(String(128))
    # orders the examples of a set; an example that replaces another takes over its position
    position: Mapped[int] = mapped_column("place")
    first_version: Mapped[int]
    end_version: Mapped[int | None]
    text: Mapped[str]
    question: Mapped[str]
    label: Mapped[str]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)


class MediaRow(Base):
    """A media item of the store.

    If `is_uploaded`, a client uploaded it separately, and only a client deletes it. Other media came with support sets
    and are deleted with their last reference.
    """

    __tablename__ = "media"

    media_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    is_uploaded: Mapped[bool]


class ExampleMediaRow(Base):
    """A reference to a media item. `position` is its index within the example."""

    __tablename__ = "example_media"
    __table_args__ = (Index("ix_example_media_by_media", "media_id"),)

    row_id: Mapped[int] = mapped_column(RowId, ForeignKey("examples.row_id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column("place", primary_key=True)
    media_id: Mapped[str] = mapped_column(String(80), ForeignKey("media.media_id"))


class LeaseRow(Base):
    """A media item that a request in progress is about to refer to. An expired lease has no effect."""

    __tablename__ = "media_leases"

    holder: Mapped[str] = mapped_column(String(64), primary_key=True)
    media_id: Mapped[str] = mapped_column(String(80), ForeignKey("media.media_id"), primary_key=True, index=True)
    expires_at: Mapped[float]


class IdempotencyRow(Base):
    """The answer to a request with an `Idempotency-Key`. `scope` is the id of the set that it changed, or ""."""

    __tablename__ = "first_answers"

    scope: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    answer: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(index=True)


class EmbeddingRow(Base):
    """A vector. `key`: a media id or the digest of a text; `model`: the fingerprint of the weights that computed it."""

    __tablename__ = "embeddings"

    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    model: Mapped[str] = mapped_column(String(128), primary_key=True)
    vector: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[float] = mapped_column(index=True)
