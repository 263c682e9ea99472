"""Responses about which examples of a support set matter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.schemas.fewshot import Method
from server.schemas.responses.base import ListSchema, ResponseSchema
from server.schemas.responses.evaluations import Interval

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class LeftOutAccuracy(ResponseSchema):
    """The accuracy of judging each example by the others; null if no label has two examples."""

    queries: int
    accuracy: float | None
    accuracy_interval: Interval | None


class Thresholds(ResponseSchema):
    similarity: float = Field(description="From this similarity on, two images are near duplicates.")


class SingleLabels(ResponseSchema):
    """Labels with a single example, which cannot be judged by others of its label."""

    count: int
    data: list[str]


class MislabelledExample(ResponseSchema):
    id: str
    label: str
    looks_like: str = Field(description="The label that it has with confidence.")
    score: float = Field(description="By how much that label is more probable, 0 to 1.")


class MislabelledExamples(ResponseSchema):
    """Examples that probably have a wrong label, the most certain first."""

    count: int
    data: list[MislabelledExample]


class HarmfulExample(ResponseSchema):
    id: str
    label: str
    value: float = Field(description="Its Shapley value in the right answers to the others, below 0.")


class HarmfulExamples(ResponseSchema):
    """Examples that make others wrong, the worst first."""

    count: int
    data: list[HarmfulExample]


class RedundantExample(ResponseSchema):
    id: str
    label: str
    duplicate_of: str = Field(
        description="The id of an earlier example with the same label, which is not in this list."
    )
    similarity: float
    same_media: bool


class RedundantExamples(ResponseSchema):
    """Near duplicates with the same label, the most similar first."""

    count: int
    data: list[RedundantExample]


class ConflictingPair(ResponseSchema):
    ids: Pair
    labels: Pair
    similarity: float
    same_media: bool


class ConflictingPairs(ResponseSchema):
    """Near duplicates with different labels, the most similar first."""

    count: int
    data: list[ConflictingPair]


class ConfusedPair(ResponseSchema):
    labels: Pair
    count: int
    counts: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        description="How many examples of the first label are most like the second, and the reverse."
    )


class ConfusedPairs(ResponseSchema):
    """Labels whose examples are taken for each other, the most frequent pair first."""

    count: int
    data: list[ConfusedPair]


class Diagnostics(ResponseSchema):
    """The findings on a version. Each `count` is of all entries, each `data` has the first `limit`."""

    object: Literal["support_set.diagnostics"]
    support_set: str
    version: int
    examples: int = Field(description="Examples with media and a label or a text: these are compared.")
    labels: int
    unlabelled: int = Field(description="Examples with media and neither label nor text.")
    without_media: int
    left_out: LeftOutAccuracy
    thresholds: Thresholds
    single: SingleLabels
    mislabelled: MislabelledExamples
    harmful: HarmfulExamples
    redundant: RedundantExamples
    conflicting: ConflictingPairs
    confused: ConfusedPairs


class LabelProbability(ResponseSchema):
    label: str
    probability: float


class Reason(ResponseSchema):
    """Why an image is suggested."""

    margin: float | None = Field(
        description="By how much the first label is more probable than the second; null without two labels."
    )
    similarity: float | None = Field(
        description="To the most similar labelled example or earlier suggestion; null if there is none."
    )
    gain: float = Field(description="The part of the pool that it covers and these do not, 0 to 1.")


class Suggestion(ResponseSchema):
    index: int = Field(description="Its position in the pool.")
    labels: list[LabelProbability] = Field(description="The two most probable labels.")
    reason: Reason


class KnownMedia(ResponseSchema):
    """An image of the pool that an example of the set shows."""

    index: int
    example: str = Field(description="The id of the example.")


class RepeatedMedia(ResponseSchema):
    """An image that the pool has twice."""

    index: int
    first_index: int = Field(description="The position of the same image before it.")


class Suggestions(ListSchema):
    """Images in the order in which to label them, and those that were not considered."""

    support_set: str
    version: int
    method: Method | None = Field(description="The method that weighs the labels; null without two labels.")
    data: list[Suggestion]
    known: list[KnownMedia]
    repeated: list[RepeatedMedia]
