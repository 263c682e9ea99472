"""Diagnoses a support set: examples that look mislabelled, harm the others, repeat, or contradict each other.

Everything follows from the vectors by which media are compared, and from the labels: each example is judged by the nearest
mean of the others. Nothing is read but what is stored already, except vectors of media that have none yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.likeness import Vectors
from server.fewshot.methods.likeness import Array, Labelled
from server.object_size import size_of
from server.quality.left_out import (
    Indices,
    LabelSums,
    LeftOutScores,
    blocks,
    confident_labels,
    label_sums,
    leave_each_out,
)
from server.quality.shapley import shapley_values
from server.schemas.responses.curation import (
    ConflictingPair,
    ConfusedPair,
    HarmfulExample,
    MislabelledExample,
    RedundantExample,
)
from server.store.examples import answer_of
from server.store.records import Example

# a value whose exact amount is zero is computed with an error of less than this
MAX_ROUNDING = 1e-9
# Near duplicates differ by at most this part of the difference, one minus the similarity, of two examples on average:
# vectors of some models are all alike. With the default model, four of five strongly compressed copies of photographs are
# as near, and among 236 photographs only the mirrored copies of two are.
NEAR = 0.1
MIN_SIMILARITY, MAX_SIMILARITY = 0.9, 0.999


@dataclass(frozen=True, slots=True)
class LabelledExamples:
    """The examples of a version that have media and an answer, with the index of each one's label."""

    examples: tuple[Example, ...]
    names: tuple[str, ...]
    indices: Indices
    num_unlabelled: int
    num_without_media: int

    def labelled(self, vectors: Vectors) -> Labelled:
        return Labelled(vectors, self.indices, len(self.names))


def read_labelled(examples: Sequence[Example]) -> LabelledExamples:
    """Return the examples that have media and an answer, with the numbers of the others."""
    with_media = [example for example in examples if example.media]
    labelled = tuple(example for example in with_media if answer_of(example))
    index = {name: number for number, name in enumerate(dict.fromkeys(map(answer_of, labelled)))}
    return LabelledExamples(
        examples=labelled,
        names=tuple(index),
        indices=np.array([index[answer_of(example)] for example in labelled], np.int64),
        num_unlabelled=len(with_media) - len(labelled),
        num_without_media=len(examples) - len(with_media),
    )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The findings on a version, each list with the most important first."""

    num_examples: int
    labels: tuple[str, ...]
    num_unlabelled: int
    num_without_media: int
    single: tuple[str, ...]
    num_judged: int
    num_right: int
    duplicate_similarity: float
    mislabelled: list[MislabelledExample]
    harmful: list[HarmfulExample]
    redundant: list[RedundantExample]
    conflicting: list[ConflictingPair]
    confused: list[ConfusedPair]

    @property
    def num_bytes(self) -> int:
        """An estimate of the memory that it takes. The lists have the texts of the labels, which may be long answers."""
        num_pairs = len(self.redundant) + len(self.conflicting) + len(self.confused)
        return 1024 + 256 * (len(self.mislabelled) + len(self.harmful) + num_pairs) + size_of(self.labels)


class Diagnosing:
    """The work to diagnose examples with their vectors [N, D]; takes time in N x N and memory in N.

    It is done in `pieces`, each of which takes a fraction of a second, so that others need not wait for all of it. The
    first and the last step, which compare each example with each label, are not divided.
    """

    def __init__(self, labelled: LabelledExamples, vectors: Vectors) -> None:
        self.pieces = list(blocks(len(vectors), len(vectors)))
        self._labelled, self._vectors = labelled, vectors
        self._sums = label_sums(labelled.labelled(vectors))
        self._left_out = leave_each_out(self._sums)
        self._values, self._duplicates = np.zeros(len(vectors)), Duplicates(labelled, duplicate_similarity(self._sums))

    def compare(self, rows: slice) -> None:
        """Do a piece: compare examples with all others. The pieces are done in their order."""
        similarities = self._vectors[rows] @ self._vectors.T
        self._values += shapley_values(self._labelled.indices, rows, similarities)
        self._duplicates.add(rows, similarities)

    def diagnosis(self) -> Diagnosis:
        """Return the diagnosis, after all pieces."""
        labelled, sums, left_out, duplicates = self._labelled, self._sums, self._left_out, self._duplicates
        is_judged = sums.has_others
        return Diagnosis(
            num_examples=len(self._vectors),
            labels=labelled.names,
            num_unlabelled=labelled.num_unlabelled,
            num_without_media=labelled.num_without_media,
            single=tuple(name for name, count in zip(labelled.names, sums.counts, strict=True) if count == 1),
            num_judged=int(is_judged.sum()),
            num_right=int((left_out.is_right & is_judged).sum()),
            duplicate_similarity=duplicates.min_similarity,
            mislabelled=_mislabelled(labelled, sums, left_out),
            harmful=_harmful(labelled, sums, self._values),
            redundant=sorted(duplicates.redundant, key=_most_similar_first),
            conflicting=sorted(duplicates.conflicting, key=_most_similar_first),
            confused=_confused(labelled, sums, left_out),
        )


def duplicate_similarity(sums: LabelSums) -> float:
    """Return the similarity from which two examples are near duplicates."""
    number = len(sums.lengths)
    total = sums.sums.sum(0, dtype=np.float64)
    mean = float(total @ total - sums.lengths.sum()) / max(number * (number - 1), 1)
    return min(max(1 - NEAR * (1 - mean), MIN_SIMILARITY), MAX_SIMILARITY)


def _mislabelled(labelled: LabelledExamples, sums: LabelSums, left_out: LeftOutScores) -> list[MislabelledExample]:
    confident, margins = confident_labels(sums, left_out)
    (rows,) = np.nonzero(confident != labelled.indices)
    entries = [
        MislabelledExample(
            labelled.examples[row].id, _label(labelled, row), labelled.names[confident[row]], float(margins[row])
        )
        for row in rows.tolist()
    ]
    return sorted(entries, key=lambda entry: -entry.score)


def _harmful(labelled: LabelledExamples, sums: LabelSums, values: Array) -> list[HarmfulExample]:
    (rows,) = np.nonzero((values < -MAX_ROUNDING) & sums.has_others)
    entries = [
        HarmfulExample(labelled.examples[row].id, _label(labelled, row), float(values[row])) for row in rows.tolist()
    ]
    return sorted(entries, key=lambda entry: entry.value)


def _confused(labelled: LabelledExamples, sums: LabelSums, left_out: LeftOutScores) -> list[ConfusedPair]:
    (rows,) = np.nonzero(sums.has_others & (left_out.truth < left_out.best))
    counts = Counter(zip(labelled.indices[rows].tolist(), left_out.other[rows].tolist(), strict=True))
    entries = []
    for first, second in dict.fromkeys((min(pair), max(pair)) for pair in counts):
        numbers = [counts[first, second], counts[second, first]]
        entries.append(ConfusedPair([labelled.names[first], labelled.names[second]], sum(numbers), numbers))
    return sorted(entries, key=lambda entry: -entry.count)


def _most_similar_first(entry: RedundantExample | ConflictingPair) -> tuple[bool, float]:
    return not entry.same_media, -entry.similarity


def _label(labelled: LabelledExamples, row: int) -> str:
    return labelled.names[labelled.indices[row]]


@dataclass(slots=True, eq=False)
class Duplicates:
    """Finds near duplicates as blocks of similarities come, in the order of the examples.

    The first of several near duplicates with one label is kept, and the others are duplicates of it. An example is in
    conflict with the most similar earlier one of another label.
    """

    labelled: LabelledExamples
    min_similarity: float
    redundant: list[RedundantExample] = field(default_factory=list)
    conflicting: list[ConflictingPair] = field(default_factory=list)
    is_kept: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.is_kept = np.ones(len(self.labelled.examples), bool)

    def add(self, rows: slice, products: Vectors) -> None:
        """Compare the examples `rows` with all earlier ones, by similarities [R, N]."""
        for row, similarities in zip(range(rows.start, rows.stop), products, strict=True):
            earlier = np.flatnonzero(similarities[:row] >= self.min_similarity)
            if len(earlier):
                self._add(row, earlier, similarities)

    def _add(self, row: int, earlier: Indices, similarities: Vectors) -> None:
        has_label = self.labelled.indices[earlier] == self.labelled.indices[row]
        duplicates, rivals = earlier[has_label & self.is_kept[earlier]], earlier[~has_label]
        if len(duplicates):
            self.is_kept[row] = False
            kept = int(duplicates[similarities[duplicates].argmax()])
            entry = RedundantExample(
                self._id(row), _label(self.labelled, row), self._id(kept), *self._compare(row, kept, similarities)
            )
            self.redundant.append(entry)
        if len(rivals):
            rival = int(rivals[similarities[rivals].argmax()])
            labels = [_label(self.labelled, rival), _label(self.labelled, row)]
            ids = [self._id(rival), self._id(row)]
            self.conflicting.append(ConflictingPair(ids, labels, *self._compare(row, rival, similarities)))

    def _compare(self, row: int, other: int, similarities: Vectors) -> tuple[float, bool]:
        examples = self.labelled.examples
        same_media = sorted(examples[row].media) == sorted(examples[other].media)
        return min(float(similarities[other]), 1.0), same_media

    def _id(self, row: int) -> str:
        return self.labelled.examples[row].id
