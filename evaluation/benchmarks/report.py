"""The results of a benchmark as JSON, and as a Markdown table with the published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.benchmarks.benchmark import Benchmark, SelectionName
from evaluation.benchmarks.scoring import METRICS, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result with one number of shots. `score` is None if the split has no public answers, or for a `problem`."""

    shots: int
    score: Score | None
    problem: str | None
    num_answers: int
    num_missing: int
    num_failed: int
    journal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    benchmark: Benchmark
    model: str
    split: str
    selection: SelectionName
    settings: Mapping[str, Any]
    num_left_out: int  # examples that cannot be used
    results: Sequence[Result]

    def values(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {
            "benchmark": self.benchmark.name,
            "metric": self.benchmark.metric,
            "model": self.model,
            "split": self.split,
            **self.settings,
            "left_out": self.num_left_out,
            "results": [
                {
                    "shots": r.shots,
                    "value": r.score and r.score.value,
                    "interval": r.score and r.score.interval,
                    "problem": r.problem,
                    "answers": r.num_answers,
                    "missing": r.num_missing,
                    "failed": r.num_failed,
                    "journal": r.journal,
                }
                for r in self.results
            ],
            "published": [figures.model_dump(mode="json") for figures in self._published],
            "notes": self._notes,
        }

    def markdown(self) -> str:
        title = f"{self.benchmark.title}, {METRICS[self.benchmark.metric].title}"
        return "\n".join([f"# {title}", "", *self._table(), "", *(f"- {note}" for note in self._notes), ""])

    @property
    def _published(self) -> list[Any]:
        return [figures for figures in self.benchmark.published if figures.selection == self.selection]

    def _table(self) -> list[str]:
        columns = [r.shots for r in self.results]
        ours = [str(r.score or _reason(r)) for r in self.results]
        model = " ".join(self.model.split()).replace("|", r"\|")
        rows = [(f"**{model}**", self.split, ours)]
        for published in self._published:
            figures = [str(published.figures.get(shots, "")) for shots in columns]
            rows.append((published.model, published.split or "not stated", figures))
        return [
            f"| {self.selection} shots | split | {' | '.join(map(str, columns))} |",
            "|---" * (len(columns) + 2) + "|",
            *(f"| {name} | {split} | {' | '.join(cells)} |" for name, split, cells in rows),
        ]

    @property
    def _notes(self) -> list[str]:
        counts = [
            f"{r.shots} shots: {r.num_answers} answers"
            + (f", {r.num_missing} rows without their media file" if r.num_missing else "")
            + (f", {r.num_failed} failed and left out" if r.num_failed else "")
            + (f", no score: {r.problem}" if r.problem else "")
            for r in self.results
        ]
        sources = sorted({published.source for published in self._published})
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        return [
            *counts,
            f"Settings: {settings}.",
            *([f"{self.num_left_out} examples cannot be used and are left out."] if self.num_left_out else []),
            *([f"Published figures: {'; '.join(sources)}."] if sources else []),
            *([self.benchmark.note] if self.benchmark.note else []),
        ]


def _reason(result: Result) -> str:
    """Return why there is no score, for a cell of the table."""
    if not result.num_answers:
        return "no answers"
    return "no score" if result.problem else "no public answers"
