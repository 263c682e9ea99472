"""WUPS (Malinowski and Fritz 2014) for open-ended answers, as NExT-QA's `eval_oe.py` and `metrics.py` compute it.

Answers are compared as lemmas without stop words. The similarity of two lemmas is a function argument: see `wordnet`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# questions whose answer must be equal: counts, and yes or no
EXACT_TYPES = {"DC", "DB"}

Similarity = Callable[[str, str], float]


def score(answer: Sequence[str], references: Sequence[Sequence[str]], kind: str, similarity: Similarity) -> float:
    """Return the WUPS at threshold 0 of an answer's lemmas, the best over the references; from 0 to 1."""
    if kind in EXACT_TYPES:
        return float(any(list(answer) == list(reference) for reference in references))
    return max(
        min(_product(answer, reference, similarity), _product(reference, answer, similarity))
        for reference in references
    )


def _product(lemmas: Sequence[str], reference: Sequence[str], similarity: Similarity) -> float:
    """Return the product of the similarity of each lemma to its nearest one, without those that have none."""
    nearest = [max((similarity(lemma, other) for other in reference), default=0.0) for lemma in lemmas]
    product = 1.0
    for value in filter(None, nearest):
        product *= value
    return product if any(nearest) else 0.0
