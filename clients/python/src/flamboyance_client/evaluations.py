"""Leave-one-out evaluations of support sets: accuracy by method, strategy and number of shots, and a recommendation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from flamboyance_client import notebook
from flamboyance_client.fewshot import Selection
from flamboyance_client.replies import Json, required

Item = TypeVar("Item")


def duration(seconds: float) -> str:
    """Return a time as people say it: seconds below a minute and a half, minutes below an hour and a half, or hours."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """The results of one method, strategy, number of shots and form of the prompt, as the mean over its seeds.

    Methods by likeness have no prompt: their `strategy`, `k`, `shots_attend` and `median_seconds` are None. `control` is
    what was taken away from the prompt.
    """

    method: str
    strategy: str | None
    k: int | None
    shots_attend: str | None = None
    control: str | None = None
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95%
    lowest_accuracy: float
    highest_accuracy: float
    queries: int
    median_seconds: float | None = None  # of an answer whose media are cached
    raw: Json = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The method, the strategy, the form unless it is "previous", and the control. Without shots, none is selected."""
        strategy = self.strategy if self.k else None if self.k is None else "no shots"
        form = "shots alone" if self.shots_attend == "alone" else None
        return ", ".join(filter(None, (self.method, strategy, form, self.control)))

    @classmethod
    def parse(cls, values: Json) -> Self:
        accuracy = required(values, "accuracy", float, "summary")
        return cls(
            method=values.get("method") or "in_context",
            strategy=values.get("strategy"),
            k=values.get("k"),
            shots_attend=values.get("shots_attend"),
            control=values.get("control"),
            accuracy=accuracy,
            accuracy_interval=_interval(values, "summary"),
            lowest_accuracy=values.get("lowest_accuracy", accuracy),
            highest_accuracy=values.get("highest_accuracy", accuracy),
            queries=values.get("queries", 0),
            median_seconds=(values.get("latency") or {}).get("median_seconds"),
            raw=values,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The most common label, and the accuracy of always answering it."""

    label: str
    accuracy: float

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            label=required(values, "label", str, "baseline"), accuracy=required(values, "accuracy", float, "baseline")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The recommended setting: `request` has the fields of a classification by it, without the query.

    As `examples` of a classification, it sets all of these fields. A classification with another method has only the
    selection of shots, `model`, `template` and `candidates`. A completion has the selection, `shots_attend`, `model` and
    `template`. Fields of the request itself take precedence. `examples` alone is the selection.
    """

    request: Json
    accuracy: float
    accuracy_interval: tuple[float, float] = field(repr=False)  # 95%
    reason: str = field(default="", repr=False)
    raw: Json = field(default_factory=dict, repr=False)

    @property
    def method(self) -> str:
        return self.request.get("method") or ""

    @property
    def examples(self) -> Selection:
        return self.request["examples"]

    @classmethod
    def parse(cls, values: Json) -> Self:
        request = required(values, "request", dict, "recommendation")
        required(request, "examples", dict, "recommendation.request")
        return cls(
            request=request,
            accuracy=required(values, "accuracy", float, "recommendation"),
            accuracy_interval=_interval(values, "recommendation"),
            reason=values.get("reason") or "",
            raw=values,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningCurve:
    """The accuracy of a method by likeness by the number of examples per label, and whether more of them will help."""

    method: str
    points: tuple[tuple[int, float], ...]
    outlook: str | None = field(default=None, repr=False)
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, values: Json) -> Self:
        points = required(values, "points", list, "learning_curve")
        return cls(
            method=required(values, "method", str, "learning_curve"),
            points=tuple((point["examples_per_label"], point["accuracy"]) for point in points),
            outlook=values.get("outlook"),
            raw=values,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A leave-one-out evaluation, finished or not. Lists omit its results. A notebook shows it as a chart and a table."""

    id: str
    status: str
    summary: tuple[SummaryRow, ...] = field(default=(), repr=False)
    baseline: Baseline | None = field(default=None, repr=False)
    recommendation: Recommendation | None = None
    learning_curve: LearningCurve | None = field(default=None, repr=False)
    note: str | None = field(default=None, repr=False)
    cells: tuple[Json, ...] = field(default=(), repr=False)
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

    @property
    def seconds_left(self) -> float | None:
        """The server's estimate of the remaining time, None until there is one and at the end."""
        return (self.raw.get("progress") or {}).get("seconds_left")

    @property
    def time_left(self) -> str:
        """The remaining time in words, such as "about 2 min left", or an empty text if it is unknown."""
        return "" if self.seconds_left is None else f"about {duration(self.seconds_left)} left"

    def _progress(self, name: str) -> int:
        progress = self.raw.get("progress") or {}
        number: int = progress.get(name, 0)
        return number

    def _repr_html_(self) -> str:
        title = f"Evaluation {self.id}: {self.status}, {self.num_queries_done} of {self.num_queries} queries"
        title += f", {self.time_left}" if self.time_left else ""
        baseline = None if self.baseline is None else (self.baseline.label, self.baseline.accuracy)
        points = [(row.name, row.k, row.accuracy, row.accuracy_interval) for row in self.summary]
        return notebook.evaluation(title, points, baseline, self.advice)

    @property
    def advice(self) -> str:
        """The reason of the recommendation, or why there is none, whether more examples will help, and the notes."""
        reason = self.recommendation.reason if self.recommendation else ""
        outlook = self.learning_curve.outlook if self.learning_curve else ""
        return " ".join(filter(None, (reason, outlook, self.note)))

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            id=required(values, "id", str, "evaluation"),
            status=required(values, "status", str, "evaluation"),
            summary=tuple(map(SummaryRow.parse, values.get("summary") or ())),
            baseline=_optional(values, "baseline", Baseline.parse),
            recommendation=_optional(values, "recommendation", Recommendation.parse),
            learning_curve=_optional(values, "learning_curve", LearningCurve.parse),
            note=values.get("note"),
            cells=tuple(values.get("cells") or ()),
            raw=values,
        )


def _optional(values: Json, name: str, parse: Callable[[Json], Item]) -> Item | None:
    value: Any = values.get(name)
    return None if value is None else parse(value)


def _interval(values: Json, path: str) -> tuple[float, float]:
    low, high = required(values, "accuracy_interval", list, path)
    return low, high
