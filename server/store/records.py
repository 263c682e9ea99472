"""What a support set is to those who read it: frozen records, without the database behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.media.source import EncodedMedia


@dataclass(frozen=True, slots=True)
class Example:
    """One worked example. `media`: ids in the media store, in their order. Texts that were not given are empty."""

    id: str
    media: tuple[str, ...]
    text: str = ""
    label: str = ""
    question: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewExample:
    """An example to store, its media still as bytes."""

    id: str
    media: tuple[EncodedMedia, ...]
    text: str = ""
    label: str = ""
    question: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportSetInfo:
    """A version of a support set without its examples. Times are in Unix seconds; `num_bytes` counts each media once;
    `label_counts`: examples by label, labels in order of appearance, those without a label left out. `example_ids`: of the
    examples that were put, in the order of the request, where this answers one."""

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
    """A version with its examples in their order. It never changes."""

    id: str
    name: str | None
    version: int
    examples: tuple[Example, ...]

    @property
    def media(self) -> list[str]:
        """The id of each different media, in order of appearance."""
        return list(dict.fromkeys(media for example in self.examples for media in example.media))


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    version: int
    created_at: float
    num_examples: int
    num_added: int
    num_replaced: int
    num_removed: int
