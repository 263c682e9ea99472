"""The accuracy of labels on labelled queries that are not in the support set, by method, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Self

from flamboyance_client.api import checked_selection
from flamboyance_client.fewshot import AnyQuery
from flamboyance_client.folders import labelled_files, listed
from flamboyance_client.frames import text_of
from flamboyance_client.options import ClassifyOptions, Method
from flamboyance_client.records import Classification, SupportSet

# a folder whose subfolders are named after the labels, or pairs of a query and its label
LabelledQueries = str | Path | Iterable[tuple[AnyQuery, str | int]]

Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The number of queries that a method has labelled as expected.

    `method` is the requested one, or that of the answers if none was requested. `used` is that of the answers: for `auto`
    the server chooses it. `accuracy` is that of the queries with a label; a request with a target may leave some without.
    `mistakes` counts pairs of an expected label and the label of the answer.
    """

    method: str
    used: str
    queries: int
    labelled: int
    correct: int
    mistakes: Mapping[tuple[str, str], int] = field(repr=False, hash=False)
    # by query: whether its label is the expected one, None without a label
    outcomes: tuple[bool | None, ...] = field(repr=False)

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    @property
    def coverage(self) -> float:
        """The share of queries that have a label."""
        return self.labelled / self.queries

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """The 95% interval of the accuracy, by Wilson's method."""
        return wilson_interval(self.correct, self.labelled) if self.labelled else None

    def compare(self, other: Accuracy) -> Comparison:
        """Compare this method with another one on the queries that both have labelled."""
        pairs = list(zip(self.outcomes, other.outcomes, strict=True))
        return Comparison(only_first=pairs.count((True, False)), only_second=pairs.count((False, True)))

    @classmethod
    def of(cls, method: str | None, answers: Sequence[Classification], labels: Sequence[str]) -> Self:
        pairs = [(label, answer.label) for label, answer in zip(labels, answers, strict=True)]
        outcomes = tuple(None if answer is None else answer == label for label, answer in pairs)
        used = ", ".join(sorted({answer.method for answer in answers}))
        return cls(
            method=method or used,
            used=used,
            queries=len(pairs),
            labelled=sum(outcome is not None for outcome in outcomes),
            correct=sum(map(bool, outcomes)),
            mistakes=Counter((label, answer) for label, answer in pairs if answer is not None and answer != label),
            outcomes=outcomes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The numbers of queries that only the first, and only the second, of two methods labels as expected."""

    only_first: int
    only_second: int

    @property
    def p_value(self) -> float:
        """The probability of a difference at least as large if both methods were equally good, by the exact sign test."""
        count, most = self.only_first + self.only_second, max(self.only_first, self.only_second)
        ways = total = comb(count, most)
        for number in range(most, count):
            ways = ways * (count - number) // (number + 1)
            total += ways
        return min(1.0, 2 * total / 2**count)


def requests_by_method(
    methods: Sequence[Method] | None, options: ClassifyOptions
) -> list[tuple[Method | None, ClassifyOptions]]:
    """Return the options of the requests by method; without methods, those of one request, which may have an own method.

    Raises `TypeError` for options that a classification does not have, and for methods next to the option `method`, and
    `ValueError` for examples that are None.
    """
    checked_selection(ClassifyOptions, options)
    if methods is None:
        return [(options.get("method"), options)]
    if isinstance(methods, str) or options.get("method") is not None:
        raise TypeError("methods must be a list of the methods to measure, and replaces method")
    return [(method, {**options, "method": method}) for method in methods]


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion (Wilson 1927)."""
    share, square = correct / count, Z_95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z_95 / (1 + square / count) * sqrt(share * (1 - share) / count + square / (4 * count**2))
    # the ends are exact where rounding would miss them
    return max(centre - half, 0.0) if correct else 0.0, min(centre + half, 1.0) if correct < count else 1.0


def check_labels(labels: Sequence[str], support_set: SupportSet) -> None:
    """Raise `ValueError` for an expected label that the set does not have, since no answer can have it."""
    known = support_set.raw.get("label_counts") or {}
    if known and (unknown := sorted(set(labels) - known.keys())):
        name = support_set.name or support_set.id
        raise ValueError(f"{name!r} does not have the labels {listed(unknown)}; it has {listed(list(known))}")


def labelled_queries(source: LabelledQueries) -> tuple[list[AnyQuery], list[str]]:
    """Return the queries and their labels, of which whole numbers become texts.

    Raises `ValueError` for other labels and if there are no queries, and what reading a folder raises.
    """
    if isinstance(source, str | Path):
        files = labelled_files(source)
        return [file.media for file in files], [str(file.label) for file in files]
    pairs = list(source)
    if not pairs:
        raise ValueError("there are no queries: give a folder, or pairs of a query and its label")
    return [query for query, _ in pairs], [
        text_of(label, f"the label of queries[{index}]") for index, (_, label) in enumerate(pairs)
    ]
