"""Lemmas and their similarity by WordNet, with nltk and its data: WordNet, its tokenizer's and its tagger's.

The steps are those of NExT-QA's evaluation, which uses pywsd's `lemmatize_sentence`.
"""

from __future__ import annotations

from collections.abc import Container
from functools import cache

import nltk
from nltk.corpus import wordnet
from nltk.stem import PorterStemmer, WordNetLemmatizer

DATA = ("wordnet", "punkt_tab", "averaged_perceptron_tagger_eng")
_PARTS_OF_SPEECH = {"JJ": "a", "NN": "n", "RB": "r", "VB": "v"}


def check_data() -> None:
    """Raise ValueError if nltk lacks data, with the command that downloads it."""
    try:
        wordnet.ensure_loaded()
        nltk.pos_tag(nltk.word_tokenize("a dog"))
    except LookupError:
        raise ValueError(
            f"WUPS needs data of nltk: python -m nltk.downloader {' '.join(DATA)}; or set NLTK_DATA to its folder"
        ) from None


def lemmas(text: str, stop_words: Container[str]) -> list[str]:
    words = [_lemma(word.lower(), tag) for word, tag in nltk.pos_tag(nltk.word_tokenize(text))]
    return [word for word in words if word not in stop_words]


def _lemma(word: str, tag: str) -> str:
    """Return the lemma, the stem or the word, whichever is the first that WordNet has.

    A word that is no adjective, noun, adverb or verb in its sentence has the part of speech that it has alone.
    """
    tag = tag if tag[:2] in _PARTS_OF_SPEECH else nltk.pos_tag([word])[0][1]
    candidates = (
        WordNetLemmatizer().lemmatize(word, _PARTS_OF_SPEECH.get(tag[:2], "n")),
        PorterStemmer().stem(word),
    )
    return next((candidate for candidate in candidates if wordnet.synsets(candidate)), word)


@cache
def similarity(first: str, second: str) -> float:
    """Return the Wu-Palmer similarity of the first senses of two lemmas; 0 for a lemma that WordNet does not have."""
    if first == second:
        return 1.0
    senses, second_senses = wordnet.synsets(first), wordnet.synsets(second)
    return float(senses[0].wup_similarity(second_senses[0]) or 0.0) if senses and second_senses else 0.0
