"""Responses about leave-one-out evaluations of support sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from model.prompt import ShotsAttend
from server.schemas.fewshot import (
    Calibration,
    CandidateField,
    ContentFree,
    Method,
    Normalisation,
    Order,
    Strategy,
    TemplateChoice,
)
from server.schemas.responses.base import Absent, PageSchema, ResponseRecord, ResponseSchema
from server.schemas.stored import Control

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Failure(ResponseSchema):
    code: str
    message: str


class Progress(ResponseSchema):
    cells: int
    queries: int
    queries_done: int
    seconds_left: float | None = Field(
        description="An estimate from the measured time of the answers so far. Null until there is one, and at the end."
    )


class DetailedProgress(Progress):
    cells_done: int


class EvaluationHead(ResponseSchema):
    """An evaluation without its results. Times are Unix times in seconds."""

    id: str
    object: Literal["evaluation"]
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    support_set: str
    version: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    progress: Progress
    error: Failure | None


class EvaluationHeads(PageSchema):
    data: list[EvaluationHead]


class Baseline(ResponseSchema):
    """The most common label, and the accuracy of always answering it."""

    label: str
    accuracy: float


@dataclass(frozen=True, slots=True)
class Bin(ResponseRecord):
    """The answers whose confidence is at least `low` and less than `high`."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


class Cost(ResponseSchema):
    """The cost per query: means over the queries."""

    prompt_tokens: float
    cached_tokens: float
    media: float
    media_encoded: float


class Latency(ResponseSchema):
    queries: int
    median_seconds: float | None
    p90_seconds: float | None


@dataclass(frozen=True, slots=True)
class CurvePoint(ResponseRecord):
    """The left-out examples whose confidence exceeds `threshold`: their share of all examples, and their accuracy."""

    threshold: float
    coverage: float
    accuracy: float
    confidence: Annotated[float, Field(description="The mean confidence of these examples.")]


Curve = Annotated[
    list[CurvePoint],
    Field(
        max_length=20,
        description="The effect of abstention, from the most confident answers to all. Empty in old evaluations.",
    ),
]
Temperature = Annotated[float, Field(description="The temperature that was fitted to all left-out examples.")]


class Gain(ResponseSchema):
    mean: float
    standard_error: float


class LearningPoint(ResponseSchema):
    """The accuracy with fewer examples, and its gain over the previous point on the same queries."""

    examples_per_label: int
    accuracy: float
    gain: Gain | None


class LearningCurve(ResponseSchema):
    """The curve of the recommended method or, if that has a prompt, of the most accurate method without one."""

    method: Method
    points: list[LearningPoint]
    outlook: str | None = Field(description="States whether more examples will help. Null for a single point.")


class Cell(ResponseSchema):
    """A method and the shots of its prompt, which are null for methods without a prompt."""

    method: Method
    strategy: Strategy | None
    k: int | None
    shots_attend: ShotsAttend | None = Field(description="The form of the prompt. Null for methods without a prompt.")
    seed: int | None
    control: Control | None


class FailedCell(Cell):
    status: Literal["failed"]
    error: Failure


class CompletedCell(Cell):
    """The results of one method, strategy, number of shots, form and seed."""

    status: Literal["completed"]
    queries: int
    correct: int
    accuracy: float
    accuracy_interval: Interval
    confusion: dict[str, dict[str, int]] = Field(
        description="The number of queries by correct label and answered label."
    )
    expected_calibration_error: float
    bins: list[Bin]
    brier: float
    nll: float
    temperature: Temperature
    curve: Curve
    learning_curve: list[LearningPoint] | Absent = Field(None, description="Present for methods without a prompt.")
    is_correct: list[bool] | Absent = Field(
        None, description="For each example of `left_out`, whether the answer is correct. Absent in old cells."
    )
    answers: list[str] | Absent = Field(
        None, description="For each example of `left_out`, the answered label. Absent in old cells."
    )
    cost: Cost
    latency: Latency
    error: None


class SummaryRow(ResponseSchema):
    """The means over the seeds of one method, strategy, number of shots, form and control.

    `temperature` and `curve` are those of `best_seed`.
    """

    method: Method
    strategy: Strategy | None
    k: int | None
    shots_attend: ShotsAttend | None = Field(description="The form of the prompt. Null for methods without a prompt.")
    control: Control | None
    seeds: int
    queries: int
    accuracy: float
    accuracy_interval: Interval
    standard_error: float
    lowest_accuracy: float
    highest_accuracy: float
    best_seed: int | None
    expected_calibration_error: float
    brier: float
    nll: float
    temperature: Temperature
    curve: Curve
    prompt_tokens: float
    latency: Latency = Field(description="The number of measured queries, and the means over the seeds.")


class RecommendedExamples(ResponseSchema):
    """The field `examples` of a few-shot request."""

    support_set: str
    version: int
    k: int | Absent = None
    strategy: Strategy | Absent = None
    seed: int | Absent = None
    order: Order | Absent = None


class RecommendedRequest(ResponseSchema):
    """The fields of a classification, with those of the evaluation's request that belong to it, if they were sent."""

    examples: RecommendedExamples
    model: str | Absent = None
    template: TemplateChoice | Absent = None
    candidates: list[CandidateField] | Absent = None
    normalisation: Normalisation | Absent = None
    calibration: Calibration | Absent = None
    content_free: ContentFree | Absent = None
    permutations: int | Absent = None
    seed: int | Absent = None
    shots_attend: ShotsAttend | Absent = Field(None, description="The form of the prompt. Present if it is `alone`.")
    method: Method
    temperature: float | Absent = Field(
        None, description="Absent for methods without a prompt: each request fits their temperature to the examples."
    )


class Recommendation(ResponseSchema):
    request: RecommendedRequest = Field(description="What to send to `/v1/classify`, with a query.")
    accuracy: float
    accuracy_interval: Interval
    reason: str


class EvaluationReport(EvaluationHead):
    """An evaluation with the results of its completed cells."""

    progress: DetailedProgress
    request: dict[str, Any]
    queries: int
    left_out: list[str] = Field(description="The ids of the examples that are left out in turn.")
    examples: int
    labels: list[str]
    baseline: Baseline
    cells: list[Annotated[CompletedCell | FailedCell, Field(discriminator="status")]]
    summary: list[SummaryRow]
    recommendation: Recommendation | None
    learning_curve: LearningCurve | None
    note: str | None = Field(
        description="Why nothing is recommended, which labels have a single example, and what the controls show."
    )
