"""The replies of all routes except completions, as frozen data. `raw` holds the whole object; see the server's docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

from flamboyance_client.replies import Json, Usage, required

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Item]):
    """A page of a list. While `has_more` is true, the next page starts after `last_id`."""

    data: tuple[Item, ...]
    has_more: bool = False
    last_id: str | int | None = None

    def __iter__(self) -> Iterator[Item]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    @classmethod
    def parse(cls, values: Json, item: Callable[[Json], Item]) -> Self:
        data = tuple(item(entry) for entry in required(values, "data", list, "page"))
        return cls(data=data, has_more=bool(values.get("has_more")), last_id=values.get("last_id"))


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
class SupportSet:
    """A version of a support set. The replies of `create` and `put` hold the ids of the new examples, in order."""

    id: str
    version: int
    name: str | None = None
    num_examples: int = 0
    status: str = "pending"
    example_ids: tuple[str, ...] = ()
    raw: Json = field(default_factory=dict, repr=False)

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
    """A candidate of a classification with its probability."""

    label: str
    probability: float
    logprob: float
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, values: Json) -> Self:
        label = required(values, "label", str, "candidate")
        return cls(label=label, probability=values["probability"], logprob=values["logprob"], raw=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """The most probable label and all candidates. `fewshot` lists the shots of the prompt."""

    label: str
    confidence: float
    candidates: tuple[WeighedCandidate, ...]
    fewshot: Json = field(default_factory=dict)
    usage: Usage | None = None
    raw: Json = field(default_factory=dict, repr=False)

    @property
    def probabilities(self) -> Mapping[str, float]:
        return {candidate.label: candidate.probability for candidate in self.candidates}

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            label=required(values, "label", str, "classification"),
            confidence=required(values, "confidence", float, "classification"),
            candidates=tuple(map(WeighedCandidate.parse, required(values, "candidates", list, "classification"))),
            fewshot=values.get("fewshot") or {},
            usage=Usage.parse(values["usage"]) if values.get("usage") else None,
            raw=values,
        )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A leave-one-out evaluation, finished or not. Lists omit its `cells`."""

    id: str
    status: str
    cells: tuple[Json, ...] = ()
    recommendation: Json | None = None
    raw: Json = field(default_factory=dict, repr=False)

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")

    @property
    def num_queries(self) -> int:
        return self._progress("queries")

    @property
    def num_queries_done(self) -> int:
        return self._progress("queries_done")

    def _progress(self, name: str) -> int:
        progress = self.raw.get("progress") or {}
        number: int = progress.get(name, 0)
        return number

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            id=required(values, "id", str, "evaluation"),
            status=required(values, "status", str, "evaluation"),
            cells=tuple(values.get("cells") or ()),
            recommendation=values.get("recommendation"),
            raw=values,
        )


def scores(values: Json) -> tuple[Score, ...]:
    return tuple(Score.parse(entry) for entry in required(values, "data", list, "scores"))


def vectors(values: Json) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(entry["embedding"]) for entry in required(values, "data", list, "embeddings"))


def is_deleted(values: Json) -> bool:
    deleted: Any = values.get("deleted")
    return deleted is True
