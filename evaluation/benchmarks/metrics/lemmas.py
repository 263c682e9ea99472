"""Computes the lemmas that NExT-QA's evaluation compares, by the steps of pywsd's `lemmatize_sentence`, with any lexicon.

A text is tagged with parts of speech. A word becomes its lemma or its stem, or does not change: the first that the lexicon
knows.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Protocol

# the first letters of a tag of the Penn Treebank -> WordNet's part of speech
PARTS_OF_SPEECH = {"JJ": "a", "NN": "n", "RB": "r", "VB": "v"}
NOUN = "n"


class Lexicon(Protocol):
    def tag(self, text: str) -> Iterable[tuple[str, str]]:
        """Return the words of a text, each with its tag of the Penn Treebank."""

    def tag_alone(self, word: str) -> str:
        """Return the tag of a word without a context."""

    def lemma(self, word: str, part_of_speech: str) -> str: ...

    def stem(self, word: str) -> str: ...

    def knows(self, word: str) -> bool: ...


def lemmas(text: str, stop_words: Container[str], lexicon: Lexicon) -> list[str]:
    words = (_lemma(word.lower(), tag, lexicon) for word, tag in lexicon.tag(text))
    return [word for word in words if word not in stop_words]


def _lemma(word: str, tag: str, lexicon: Lexicon) -> str:
    """Return the lemma, the stem or the word, whichever is the first that the lexicon knows.

    If a word is not an adjective, noun, adverb or verb in its sentence, its part of speech without context is used.
    """
    tag = tag if tag[:2] in PARTS_OF_SPEECH else lexicon.tag_alone(word)
    candidates = (lexicon.lemma(word, PARTS_OF_SPEECH.get(tag[:2], NOUN)), lexicon.stem(word))
    return next(filter(lexicon.knows, candidates), word)
