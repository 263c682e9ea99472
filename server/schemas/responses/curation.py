"""Responses about which examples of a support set matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from server.schemas.fewshot import Method
from server.schemas.responses.base import ListSchema, ResponseRecord, ResponseSchema
from server.schemas.responses.evaluations import Interval

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class LeftOutAccuracy(ResponseSchema):
    """The leave-one-out accuracy with its 95% interval. Null if no label has two examples."""

    queries: int
    accuracy: float | None
    accuracy_interval: Interval | None


class Thresholds(ResponseSchema):
    similarity: float = Field(description="The similarity from which two images count as near duplicates.")


class Counted(ResponseSchema):
    count: int


class SingleLabels(Counted):
    """Labels with a single example, which cannot be left out."""

    data: list[str]


@dataclass(frozen=True, slots=True)
class MislabelledExample(ResponseRecord):
    id: str
    label: str
    looks_like: Annotated[str, Field(description="A more probable label.")]
    score: Annotated[float, Field(description="The difference of the probabilities of the two labels, 0 to 1.")]


class MislabelledExamples(Counted):
    """Examples that probably have a wrong label, the most certain first."""

    data: list[MislabelledExample]


@dataclass(frozen=True, slots=True)
class HarmfulExample(ResponseRecord):
    id: str
    label: str
    value: Annotated[
        float, Field(description="Its Shapley value: the contribution to the number of correct answers, below 0.")
    ]


class HarmfulExamples(Counted):
    """Examples that make the classification of others wrong, the worst first."""

    data: list[HarmfulExample]


@dataclass(frozen=True, slots=True)
class RedundantExample(ResponseRecord):
    id: str
    label: str
    duplicate_of: Annotated[
        str, Field(description="The id of an earlier example with the same label. It is not in the list.")
    ]
    similarity: float
    same_media: bool


class RedundantExamples(Counted):
    """Near duplicates with the same label, the most similar first."""

    data: list[RedundantExample]


@dataclass(frozen=True, slots=True)
class ConflictingPair(ResponseRecord):
    ids: Pair
    labels: Pair
    similarity: float
    same_media: bool


class ConflictingPairs(Counted):
    """Near duplicates with different labels, the most similar first."""

    data: list[ConflictingPair]


@dataclass(frozen=True, slots=True)
class ConfusedPair(ResponseRecord):
    labels: Pair
    count: int
    counts: Annotated[
        list[int],
        Field(
            min_length=2,
            max_length=2,
            description="The number of examples of the first label that are most similar to the second, and the reverse.",
        ),
    ]


class ConfusedPairs(Counted):
    """Pairs of labels that are confused, the most frequent first."""

    data: list[ConfusedPair]


class Diagnostics(ResponseSchema):
    """The problematic examples of a version. Each `count` includes all entries; each `data` has the first `limit`."""

    object: Literal["support_set.diagnostics"]
    support_set: str
    version: int
    examples: int = Field(description="The number of compared examples: those with media and a label or a text.")
    labels: int
    unlabelled: int = Field(description="The number of examples with media that have neither label nor text.")
    without_media: int = Field(description="The number of examples without media.")
    left_out: LeftOutAccuracy
    thresholds: Thresholds
    single: SingleLabels
    mislabelled: MislabelledExamples
    harmful: HarmfulExamples
    redundant: RedundantExamples
    conflicting: ConflictingPairs
    confused: ConfusedPairs


@dataclass(frozen=True, slots=True)
class LabelProbability(ResponseRecord):
    label: str
    probability: float


class Reason(ResponseSchema):
    """Why an image is suggested."""

    margin: float | None = Field(
        description="The difference of the probabilities of the two labels. Null without two labels."
    )
    similarity: float | None = Field(
        description="The similarity to the most similar labelled example or earlier suggestion. Null if there is none."
    )
    gain: float = Field(description="The increase of the weighted coverage of the pool, 0 to 1.")


class Suggestion(ResponseSchema):
    index: int = Field(description="The index in the pool.")
    labels: list[LabelProbability] = Field(description="The two most probable labels.")
    reason: Reason


class KnownMedia(ResponseSchema):
    """An image of the pool that is already in the set."""

    index: int
    example: str = Field(description="The id of the example.")


class RepeatedMedia(ResponseSchema):
    """An image that equals an earlier one of the pool."""

    index: int
    first_index: int = Field(description="The index of the earlier image.")


class Suggestions(ListSchema):
    """The suggested images in the order in which to label them, and images that are not suggested."""

    support_set: str
    version: int
    method: Method | None = Field(description="The method that computes the labels. Null without two labels.")
    data: list[Suggestion]
    known: list[KnownMedia]
    repeated: list[RepeatedMedia]
