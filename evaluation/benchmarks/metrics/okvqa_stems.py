"""Stems answers to OKVQA, whose metric is the accuracy of stemmed answers.

The stemmer of OKVQA v1.1 is not published, but the annotations have each answer before and after stemming (`raw_answer` and
`answer`). So an answer in the annotations, or a word of one, gets its stem from there. Any other word can be right only if
its stem is that of an answer. So it loses the ending of a plural or of an -ing form if the rest is a stem of the
annotations. OpenFlamingo's `ok_vqa_utils.py` also stems words one by one. It has a table of exceptions from the same
annotations, and uses a tagger and WordNet for all other words.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

WORD = re.compile(r"[^\W_](?:['’-]?[^\W_])*")
# the ending of a plural or of an -ing form, and its possible replacements
ENDINGS = (("s", ("",)), ("es", ("",)), ("ies", ("y",)), ("ves", ("f", "fe")), ("ing", ("", "e")))


class OkvqaStemmer:
    """Stems answers by the annotations' pairs of an answer before and after it was stemmed."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        words: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for raw, stemmed in pairs:
            answers[raw][stemmed] += 1
            raw_words, stems = WORD.findall(raw.lower()), WORD.findall(stemmed.lower())
            if len(raw_words) == len(stems):
                for word, stem in zip(raw_words, stems, strict=True):
                    words[word][stem] += 1
        self._answers, self._words = _most_common(answers), _most_common(words)
        self._stems = set(self._words.values())

    def stem(self, answer: str) -> str:
        answer = answer.strip()
        if answer in self._answers:
            return self._answers[answer]
        return WORD.sub(lambda match: self._stem_word(match[0]), answer)

    def _stem_word(self, word: str) -> str:
        """Return the stem of a word, with a capital letter if the word has one: the evaluator may distinguish case."""
        lower = word.lower()
        stem = self._words.get(lower) or next(filter(self._stems.__contains__, [lower, *_without_ending(lower)]), lower)
        if stem == lower:
            return word
        return stem if word == lower else stem.capitalize()


def _most_common(counts: Mapping[str, Counter[str]]) -> dict[str, str]:
    return {text: stems.most_common(1)[0][0] for text, stems in counts.items()}


def _without_ending(word: str) -> Iterator[str]:
    """Yield the words whose plural or -ing form a word may be, those with the shortest removed ending first."""
    for ending, replacements in ENDINGS:
        if (rest := word.removesuffix(ending)) != word and rest[-1:].isalpha():
            yield from (rest + replacement for replacement in replacements)
            if ending == "ing" and rest[-1:] == rest[-2:-1]:  # running
                yield rest[:-1]
