"""CIDEr-D (Vedantam et al. 2015), as coco-caption computes it for captions.

The words are those of coco-caption's tokenizer, a Java program, as far as English captions need it: lower case, separate
clitics, no punctuation. Brackets are words, as in that tokenizer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_N = 4
SIGMA = 6.0

Ngram = tuple[str, ...]

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_JOINED = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me", "wanna": "wan na"}
_CLITIC = re.compile(r"(?<=\w)(?:n't|'(?:s|m|d|ll|re|ve))(?!\w)")
_WORD = re.compile(
    r"""n't | '(?:s|m|d|ll|re|ve)(?!\w) | 'n' | o'\w+  # clitics, and words with an apostrophe
    | -[lr][rsc]b- | <\w+> | [!?]{2,} | [$%&\#@+*=/]   # brackets, and marks that are words
    | (?<!\w)(?:[a-z]\.)+(?!\w)                        # initials
    | (?<!\w)(?:st|mr|mrs|ms|dr|jr|sr|vs|mt|ave|inc|co)\.(?!\w) | (?<!\w)no\.(?=\s?\d)
    | \w+ (?: [-/&]\w+ | (?<=\d)[.,:]\d+ )*""",
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    text = caption.lower().replace("’", "'")
    for bracket, name in _BRACKETS.items():
        text = text.replace(bracket, f" {name} ")
    text = _CLITIC.sub(r" \g<0>", text)
    return _WORD.findall(" ".join(_JOINED.get(word, word) for word in text.split()))


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
