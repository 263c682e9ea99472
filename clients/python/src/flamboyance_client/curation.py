"""Records for curating a support set: diagnostics of its examples, and suggestions of media to label next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Self, TypeVar

from flamboyance_client.errors import UnexpectedReply
from flamboyance_client.fewshot import QueryMedia
from flamboyance_client.prompt import checked_list
from flamboyance_client.replies import Json, required

POOL = "a pool must be a list, which media_files(folder) returns of the images and videos in a folder"
Entry = TypeVar("Entry", bound="Finding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The base of all findings."""

    @classmethod
    def parse(cls, values: Json) -> Self:
        names = [field.name for field in fields(cls)]
        if lack := next((name for name in names if name not in values), None):
            raise UnexpectedReply(f"{cls.__name__.lower()}.{lack}: missing")
        sent = {name: values[name] for name in names}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in sent.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Mislabelled(Finding):
    """An example that probably has the label `looks_like`; `score` is by how much that is more probable, 0 to 1."""

    id: str
    label: str
    looks_like: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Harmful(Finding):
    """An example that makes others wrong; `value` is its part in the number of right answers, below 0."""

    id: str
    label: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Redundant(Finding):
    """A near duplicate of an earlier example with the same label."""

    id: str
    label: str
    duplicate_of: str
    similarity: float
    same_media: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflicting(Finding):
    """Two near duplicates with different labels."""

    ids: tuple[str, str]
    labels: tuple[str, str]
    similarity: float
    same_media: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Confused(Finding):
    """Two labels, how many of their examples are taken for the other label, and how many of each."""

    labels: tuple[str, str]
    count: int
    counts: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings(Generic[Entry]):
    """The findings of one kind, the most important first: `count` in all, and the first of them."""

    count: int
    data: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    @classmethod
    def parse(cls, values: Json, name: str, entry: type[Entry]) -> Self:
        section = required(values, name, dict, "diagnostics")
        data = tuple(map(entry.parse, required(section, "data", list, name)))
        return cls(count=required(section, "count", int, name), data=data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """The findings on a version of a support set. `raw` has the thresholds, and labels with a single example."""

    support_set: str
    version: int
    examples: int
    accuracy: float | None  # of each example by the others
    mislabelled: Findings[Mislabelled] = field(repr=False)
    harmful: Findings[Harmful] = field(repr=False)
    redundant: Findings[Redundant] = field(repr=False)
    conflicting: Findings[Conflicting] = field(repr=False)
    confused: Findings[Confused] = field(repr=False)
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            support_set=required(values, "support_set", str, "diagnostics"),
            version=required(values, "version", int, "diagnostics"),
            examples=required(values, "examples", int, "diagnostics"),
            accuracy=required(values, "left_out", dict, "diagnostics").get("accuracy"),
            mislabelled=Findings.parse(values, "mislabelled", Mislabelled),
            harmful=Findings.parse(values, "harmful", Harmful),
            redundant=Findings.parse(values, "redundant", Redundant),
            conflicting=Findings.parse(values, "conflicting", Conflicting),
            confused=Findings.parse(values, "confused", Confused),
            raw=values,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """Media to label next: as they were passed, their index in the pool, their most probable labels, and the reasons."""

    index: int
    media: QueryMedia = field(repr=False)
    probabilities: Mapping[str, float]
    reason: Mapping[str, Any]
    raw: Json = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestions:
    """Media of a pool in the order in which to label them; `known` has the id of the example by index in the pool."""

    data: tuple[Suggestion, ...]
    known: Mapping[int, str] = field(default_factory=dict)
    raw: Json = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Suggestion]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    @classmethod
    def parse(cls, values: Json, pool: Sequence[QueryMedia]) -> Self:
        data = (_suggestion(entry, pool) for entry in required(values, "data", list, "suggestions"))
        known = {entry["index"]: entry["example"] for entry in values.get("known") or ()}
        return cls(data=tuple(data), known=known, raw=values)


def _suggestion(values: Json, pool: Sequence[QueryMedia]) -> Suggestion:
    index = required(values, "index", int, "suggestion")
    probabilities = {entry["label"]: entry["probability"] for entry in values.get("labels") or ()}
    return Suggestion(
        index=index, media=pool[index], probabilities=probabilities, reason=values.get("reason") or {}, raw=values
    )


def checked_pool(pool: Sequence[QueryMedia]) -> list[QueryMedia]:
    """Return the media as a list. Raises `TypeError` for a single path or image."""
    return checked_list(pool, POOL)
