"""The lexicon of WUPS, from nltk and its data: WordNet, and the trained tokenizer and tagger."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import nltk
from nltk.corpus import wordnet
from nltk.stem import PorterStemmer, WordNetLemmatizer

DATA = ("wordnet", "punkt_tab", "averaged_perceptron_tagger_eng")


def check_data() -> None:
    """Raise ValueError if nltk lacks data, with the command that downloads it."""
    try:
        wordnet.ensure_loaded()
        nltk.pos_tag(nltk.word_tokenize("a dog"))
    except LookupError:
        raise ValueError(
            f"WUPS needs data of nltk: python -m nltk.downloader {' '.join(DATA)}; or set NLTK_DATA to its folder"
        ) from None


class WordNet:
    """The lexicon of `lemmas`."""

    def __init__(self) -> None:
        self._lemmatizer, self._stemmer = WordNetLemmatizer(), PorterStemmer()

    def tag(self, text: str) -> Sequence[tuple[str, str]]:
        tagged: Sequence[tuple[str, str]] = nltk.pos_tag(nltk.word_tokenize(text))
        return tagged

    def tag_alone(self, word: str) -> str:
        return str(nltk.pos_tag([word])[0][1])

    def lemma(self, word: str, part_of_speech: str) -> str:
        return str(self._lemmatizer.lemmatize(word, part_of_speech))

    def stem(self, word: str) -> str:
        return str(self._stemmer.stem(word))

    def knows(self, word: str) -> bool:
        return bool(wordnet.synsets(word))


@cache
def similarity(first: str, second: str) -> float:
    """Return the Wu-Palmer similarity of the first senses of two lemmas; 0 for a lemma that WordNet does not have."""
    if first == second:
        return 1.0
    senses, second_senses = wordnet.synsets(first), wordnet.synsets(second)
    return float(senses[0].wup_similarity(second_senses[0]) or 0.0) if senses and second_senses else 0.0
