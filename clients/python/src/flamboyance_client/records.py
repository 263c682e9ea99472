"""The replies of all routes except completions, as frozen data. `raw` holds the whole object; see the server's docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

from flamboyance_client import notebook
from flamboyance_client.errors import UnexpectedReply
from flamboyance_client.fewshot import AnyQuery
from flamboyance_client.prompt import Media
from flamboyance_client.replies import Json, Usage, required
from flamboyance_client.thumbnails import query_media, thumbnail

Item = TypeVar("Item")

MAX_LABELS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Item]):
    """A page of a list. While `has_more` is true, the next page starts after `last_id`.

    `examples_left_out`: of a search, the examples for which the reply has no room.
    """

    data: tuple[Item, ...]
    has_more: bool = False
    last_id: str | int | None = None
    examples_left_out: int = 0

    def __iter__(self) -> Iterator[Item]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    @classmethod
    def parse(cls, values: Json, item: Callable[[Json], Item]) -> Self:
        data = tuple(item(entry) for entry in required(values, "data", list, "page"))
        has_more, last_id = bool(values.get("has_more")), values.get("last_id")
        if has_more and last_id is None:
            raise UnexpectedReply("page.last_id: expected an id, since has_more is true, got None")
        return cls(
            data=data, has_more=has_more, last_id=last_id, examples_left_out=values.get("examples_left_out") or 0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMedia:
    """An uploaded image or video, whose id can be used in prompts, shots and support sets."""

    id: str
    object: str = "image"
    bytes: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, values: Json) -> Self:
        details = {name: values.get(name) for name in ("bytes", "width", "height", "frames")}
        return cls(id=required(values, "id", str, "media"), object=values.get("object", "image"), **details, raw=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """An example to show: its label or text, and its media."""

    label: str
    media: Media | None


@dataclass(frozen=True, slots=True, order=True)
class SkippedFile:
    """A file that an upload has left out, because it cannot be read or the server has refused it."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportSet:
    """A version of a support set. A notebook shows it with the `previews` that the call which returned it has read.

    The replies of `create` and `put` hold the ids of the new examples, in order. `num_removed` is how many examples an
    upload of a folder or a data frame has removed, and `skipped` are the files that `skip_unreadable` has left out.
    """

    id: str
    version: int
    name: str | None = None
    num_examples: int = 0
    status: str = "pending"
    example_ids: tuple[str, ...] = field(default=(), repr=False)
    previews: tuple[Preview, ...] = field(default=(), repr=False, compare=False)
    num_removed: int = field(default=0, repr=False, compare=False)
    skipped: tuple[SkippedFile, ...] = field(default=(), repr=False, compare=False)
    raw: Json = field(default_factory=dict, repr=False)

    def _repr_html_(self) -> str:
        labels: Mapping[str, int] = self.raw.get("label_counts") or {}
        counts = ", ".join(f"{notebook.short(label)}: {count}" for label, count in list(labels.items())[:MAX_LABELS])
        more = f" and {len(labels) - MAX_LABELS} more" if len(labels) > MAX_LABELS else ""
        facts = [("id", self.id), ("version", str(self.version)), ("examples", str(self.num_examples))]
        facts += [("labels", counts + more)] if labels else []
        previews = [
            (preview.label, None if preview.media is None else thumbnail(preview.media)) for preview in self.previews
        ]
        return notebook.support_set(f"Support set {self.name or ''}", facts, previews, self.num_examples)

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            id=required(values, "id", str, "support set"),
            version=required(values, "version", int, "support set"),
            name=values.get("name"),
            num_examples=values.get("num_examples", 0),
            status=values.get("status", "pending"),
            example_ids=tuple(values.get("example_ids") or ()),
            raw=values,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredExample:
    """An example of a support set. Results of a search have a `score`."""

    id: str
    text: str = ""
    question: str = ""
    label: str = ""
    metadata: Json = field(default_factory=dict)
    score: float | None = None
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, values: Json) -> Self:
        texts = {name: values.get(name) or "" for name in ("text", "question", "label")}
        return cls(
            id=required(values, "id", str, "example"),
            **texts,
            metadata=values.get("metadata") or {},
            score=values.get("score"),
            raw=values,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeighedCandidate:
    """A candidate of a classification with its probability.

    `scores` are its log-probabilities by each part of the method; `logprob` is None if the language model took no part.
    """

    label: str
    probability: float
    logprob: float | None
    scores: Mapping[str, float] = field(default_factory=dict, repr=False)
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, values: Json) -> Self:
        label = required(values, "label", str, "candidate")
        return cls(
            label=label,
            probability=values["probability"],
            logprob=values.get("logprob"),
            scores=values.get("scores") or {},
            raw=values,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """The most probable label and all candidates. `fewshot` lists the shots of the prompt. A notebook shows it as bars.

    `label` is None if the request has a target, and `confidence` does not exceed the `threshold` that this needs.
    """

    label: str | None
    confidence: float
    candidates: tuple[WeighedCandidate, ...] = field(repr=False)
    temperature: float = field(default=1.0, repr=False)
    threshold: float | None = field(default=None, repr=False)
    method: str = field(default="in_context", repr=False)
    fewshot: Json = field(default_factory=dict, repr=False)
    usage: Usage | None = field(default=None, repr=False)
    # the query as it was passed: a notebook shows its image
    query: AnyQuery | None = field(default=None, repr=False, compare=False)
    raw: Json = field(default_factory=dict, repr=False)

    @property
    def probabilities(self) -> Mapping[str, float]:
        return {candidate.label: candidate.probability for candidate in self.candidates}

    def _repr_html_(self) -> str:
        media = query_media(self.query)
        query = None if media is None else ("query", thumbnail(media))
        label = "no label" if self.label is None else notebook.short(self.label)
        title = f"{label} ({self.confidence:.3f})"
        return notebook.classification(title, query, list(self.probabilities.items()))

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            label=_label(values),
            confidence=required(values, "confidence", float, "classification"),
            threshold=values.get("threshold"),
            temperature=values.get("temperature", 1.0),
            candidates=tuple(map(WeighedCandidate.parse, required(values, "candidates", list, "classification"))),
            method=values.get("method") or "in_context",
            fewshot=values.get("fewshot") or {},
            usage=Usage.parse(values["usage"]) if values.get("usage") else None,
            raw=values,
        )


def _label(values: Json) -> str | None:
    """Return the label, which may be null only in a reply with a threshold."""
    if values.get("threshold") is not None and values.get("label") is None:
        return None
    label: str = required(values, "label", str, "classification")
    return label


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The log-probability of a continuation, as a sum and per token."""

    logprob: float
    token_logprobs: tuple[float, ...]
    tokens: tuple[str, ...]

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            logprob=required(values, "logprob", float, "score"),
            token_logprobs=tuple(values.get("token_logprobs") or ()),
            tokens=tuple(values.get("tokens") or ()),
        )


def scores(values: Json) -> tuple[Score, ...]:
    return tuple(Score.parse(entry) for entry in required(values, "data", list, "scores"))


def vectors(values: Json) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(entry["embedding"]) for entry in required(values, "data", list, "embeddings"))


def is_deleted(values: Json) -> bool:
    deleted: Any = values.get("deleted")
    return deleted is True
