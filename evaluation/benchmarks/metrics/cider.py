"""CIDEr-D (Vedantam et al. 2015), as coco-caption computes it for captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.benchmarks.metrics.caption_words import tokenize

MAX_N = 4
SIGMA = 6.0

Ngram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Vector:
    """The n-grams of a caption by length, weighted by how rare they are, and the number of its bigrams."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the score of each caption with its references, from 0 to 10; the mean is the score of all.

    The weight of an n-gram depends on all references, so scores of a sample and of the whole split are not comparable.
    """
    counted = [[_ngrams(tokenize(text)) for text in texts] for texts in references]
    frequencies = Counter(ngram for texts in counted for ngram in set().union(*texts))
    num_documents = math.log(len(references))
    scores = []
    for caption, texts in zip(captions, counted, strict=True):
        vector = _vector(_ngrams(tokenize(caption)), frequencies, num_documents)
        similarities = [_similarity(vector, _vector(text, frequencies, num_documents)) for text in texts]
        scores.append(10 * sum(similarities) / len(similarities))
    return scores


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _vector(ngrams: Counter[Ngram], frequencies: Counter[Ngram], num_documents: float) -> _Vector:
    weights: list[dict[Ngram, float]] = [{} for _ in range(MAX_N)]
    for ngram, count in ngrams.items():
        weights[len(ngram) - 1][ngram] = count * (num_documents - math.log(max(1, frequencies[ngram])))
    norms = [math.sqrt(sum(weight * weight for weight in part.values())) for part in weights]
    return _Vector(weights, norms, sum(count for ngram, count in ngrams.items() if len(ngram) == 2))


def _similarity(caption: _Vector, reference: _Vector) -> float:
    total = 0.0
    for n in range(MAX_N):
        if norm := caption.norms[n] * reference.norms[n]:
            shared = caption.weights[n].keys() & reference.weights[n].keys()
            total += (
                sum(min(caption.weights[n][g], reference.weights[n][g]) * reference.weights[n][g] for g in shared)
                / norm
            )
    return total / MAX_N * math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
