"""Frozen records of support sets, as their readers see them, without the database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.media.source import EncodedMedia


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example. `media` are ids in the media store, in order. Missing texts are empty."""

    id: str
    media: tuple[str, ...]
    text: str = ""
    label: str = ""
    question: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportSet:
    """A version of a support set with its examples in order. It never changes."""

    id: str
    name: str | None
    version: int
    examples: tuple[Example, ...]

    @property
    def media(self) -> list[str]:
        """The ids of all distinct media, in order of appearance."""
        return list(dict.fromkeys(media_id for example in self.examples for media_id in example.media))


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """A version of a support set as its history lists it."""

    version: int
    created_at: float
    num_examples: int
    num_added: int
    num_replaced: int
    num_removed: int


@dataclass(frozen=True, slots=True)
class Totals:
    """The ids and latest versions of all sets, and the number of bytes of all media that they refer to."""

    latest: list[tuple[str, int]]
    num_bytes: int
