"""The accuracy of labels on labelled queries that are not in the support set, by method, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Self
from unicodedata import normalize

from flamboyance_client.api import SHOTS, checked_selection, classification_fields
from flamboyance_client.fewshot import AnyQuery
from flamboyance_client.folders import labelled_files, listed
from flamboyance_client.frames import text_of
from flamboyance_client.options import ClassifyOptions, Method
from flamboyance_client.prompt import checked_list
from flamboyance_client.records import Classification
from flamboyance_client.steps import Steps
from flamboyance_client.stored import SupportSetCalls, read_examples

# a folder whose subfolders are named after the labels, or pairs of a query and its label
LabelledQueries = str | Path | Iterable[tuple[AnyQuery, str | int]]

Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The number of queries that a method has labelled as expected.

    `method` is the requested one, or that of the answers if none was requested. `used` is that of the answers: for `auto`
    the server chooses it. `accuracy` is that of the queries with a label; a request with a target may leave some without.
    `mistakes` counts pairs of an expected label and the label of the answer. Labels are compared in the Unicode form NFC.
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
        answered = [None if answer.label is None else _nfc(answer.label) for answer in answers]
        pairs = list(zip(map(_nfc, labels), answered, strict=True))
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


def check_labels(calls: SupportSetCalls, labels: Sequence[str], options: ClassifyOptions) -> Steps[None]:
    """Raise `ValueError` for expected labels that no answer to a classification with these options can have."""
    known = dict.fromkeys(map(_nfc, (yield from _possible_labels(calls, options))))
    if known and (unknown := sorted(set(map(_nfc, labels)) - known.keys())):
        raise ValueError(
            f"no answer can have the labels {listed(_distinct(unknown, known))}; "
            f"the possible ones are {listed(_distinct(known, unknown))}"
        )


def _possible_labels(calls: SupportSetCalls, options: ClassifyOptions) -> Steps[list[str]]:
    """Return the labels that the server weighs: of the candidates, or else the answers of the shots or of the set."""
    fields = classification_fields(options)
    if (candidates := fields.get("candidates")) is not None:
        return [candidate if isinstance(candidate, str) else candidate["label"] for candidate in candidates]
    if shots := checked_list(fields.get("shots", ()), SHOTS):
        return [answer for shot in shots if (answer := shot.get("label") or shot.get("text") or shot.get("answer"))]
    selection = fields.get("examples") or {}
    if "support_set" not in selection:
        return []
    support_set = yield calls.get(selection["support_set"], selection.get("version"))
    counts: Mapping[str, int] = support_set.raw.get("label_counts") or {}
    if sum(counts.values()) >= support_set.num_examples:
        return list(counts)
    # the answer of an example without a label is its text
    answers = yield from read_examples(calls, support_set, lambda stored: stored.label or stored.text)
    return [answer for answer in answers if answer]


def _nfc(label: str) -> str:
    return normalize("NFC", label)


def _distinct(labels: Collection[str], opposed: Collection[str]) -> list[str]:
    """Return the labels as a message shows them: one that looks like an opposed label in ASCII, with escapes."""
    visible = set(map(_visible, opposed))
    return [ascii(label) if _visible(label) in visible else label for label in labels]


def _visible(label: str) -> str:
    """Return what people see of a label, by which labels that look the same are equal."""
    letters = (letter for letter in normalize("NFKC", label) if letter.isprintable() and not letter.isspace())
    return "".join(letters).casefold()


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
