"""Frozen records of support sets, and the tables that hold them.

A row of an example covers a range of versions, so a version costs only its changes: version n of a set holds the rows with
`first_version <= n` that had not ended by then (`end_version`, exclusive). In a version, no other column of a row changes.
A media row that is referred to, or leased by a request that is about to refer to it, cannot be deleted, and neither can its
bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, ForeignKeyConstraint, Index, Integer, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from server.media.source import EncodedMedia
from server.store.database import Base
from server.store.examples import Examples

# SQLite generates ids only for a key that is declared as INTEGER
RowId = BigInteger().with_variant(Integer(), "sqlite")

# of an example without its texts
EXAMPLE_BYTES = 256
NO_METADATA = "{}"


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example. `media` are ids in the media store, in order. Missing texts are empty.

    The metadata stay JSON: to read them from thousands of examples at once would stop the event loop.
    """

    id: str
    media: tuple[str, ...]
    text: str = ""
    label: str = ""
    question: str = ""
    metadata_json: str = NO_METADATA

    @property
    def num_bytes(self) -> int:
        """The approximate number of bytes in memory."""
        texts = (self.id, *self.media, self.text, self.label, self.question, self.metadata_json)
        return EXAMPLE_BYTES + sum(map(sys.getsizeof, texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewExample:
    """An example to store, with its media still as bytes."""

    id: str
    media: tuple[EncodedMedia, ...]
    text: str = ""
    label: str = ""
    question: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportSetInfo:
    """A version of a support set without its examples. Times are in Unix seconds.

    `num_bytes` counts each media item once. `label_counts` are numbers of examples by label, in order of appearance,
    without the unlabelled ones. `example_ids` are those of the examples that a request put, in its order.
    """

    id: str
    name: str | None
    version: int
    latest_version: int
    created_at: float
    updated_at: float
    expires_at: float | None
    is_pinned: bool
    metadata: dict[str, Any]
    num_examples: int
    num_media: int
    num_bytes: int
    label_counts: dict[str, int]
    example_ids: tuple[str, ...] = field(default=(), compare=False)

    @property
    def num_label_characters(self) -> int:
        """The number of characters in the labels, of which there may be millions."""
        return sum(map(len, self.label_counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportSet:
    """A version of a support set with its examples in order. It never changes."""

    id: str
    name: str | None
    version: int
    examples: Examples[Example]

    @property
    def media(self) -> list[str]:
        """The ids of all distinct media, in order of appearance."""
        return list(dict.fromkeys(media_id for example in self.examples for media_id in example.media))


@dataclass(frozen=True, slots=True)
class Totals:
    """The ids and latest versions of all sets by tenant, and the number of bytes of all media that they refer to."""

    latest: Mapping[str, frozenset[tuple[str, int]]]
    num_bytes: int


class SupportSetRow(Base):
    """A support set. `version` is the latest, 0 before the first; times are in Unix seconds, and null means never.

    `name` begins with the tenant's.
    """

    __tablename__ = "support_sets"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str | None] = mapped_column(String(192), unique=True)
    version: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]
    updated_at: Mapped[float]
    expires_at: Mapped[float | None] = mapped_column(index=True)
    is_pinned: Mapped[bool]
    # the position of the next new example
    next_position: Mapped[int] = mapped_column("next_place", default=0)
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)
    tenant: Mapped[str] = mapped_column(String(48), server_default="", index=True)


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
    """A stored media item: deleted with its last reference or, if a client uploaded it separately, only by a client.

    In this table and those that refer to it, an id begins with the tenant's name.
    """

    __tablename__ = "media"

    media_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    is_uploaded: Mapped[bool]


class ExampleMediaRow(Base):
    """A reference to a media item. `position` is its index within the example."""

    __tablename__ = "example_media"
    __table_args__ = (Index("ix_example_media_by_media", "media_id"),)

    row_id: Mapped[int] = mapped_column(RowId, ForeignKey("examples.row_id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column("place", primary_key=True)
    media_id: Mapped[str] = mapped_column(String(128), ForeignKey("media.media_id"))


class LeaseRow(Base):
    """A media item that a request in progress is about to refer to. An expired lease has no effect."""

    __tablename__ = "media_leases"

    holder: Mapped[str] = mapped_column(String(64), primary_key=True)
    media_id: Mapped[str] = mapped_column(String(128), ForeignKey("media.media_id"), primary_key=True, index=True)
    expires_at: Mapped[float]


class IdempotencyRow(Base):
    """The answer to a request with an `Idempotency-Key`.

    `scope` is the id of the set that it changed; for one that created a set, it names the tenant, "" for the default one.
    """

    __tablename__ = "first_answers"

    scope: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    answer: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(index=True)


class EmbeddingRow(Base):
    """A vector. `model`: the fingerprint of the weights that computed it.

    `key`: a media id or the digest of a text, after the name of the tenant.
    """

    __tablename__ = "embeddings"

    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    model: Mapped[str] = mapped_column(String(128), primary_key=True)
    vector: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[float] = mapped_column(index=True)


class FitRow(Base):
    """The fit of a method to a version, with the vectors of a model, as named arrays. `format`: how it was fitted."""

    __tablename__ = "fits"
    __table_args__ = (
        ForeignKeyConstraint(
            ["set_id", "version"],
            ["support_set_versions.set_id", "support_set_versions.version"],
            ondelete="CASCADE",
        ),
    )

    set_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    method: Mapped[str] = mapped_column(String(32), primary_key=True)
    model: Mapped[str] = mapped_column(String(128), primary_key=True)
    format: Mapped[int] = mapped_column(primary_key=True)
    arrays: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[float] = mapped_column(index=True)
