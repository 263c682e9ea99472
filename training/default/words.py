"""Novel words are names that only a prompt can teach: invented words, and common words that do not fit the image.

A fifth of the invented words is never used in training. Common words that do not fit are used so that no word is more
likely than another (symbol tuning, Wei et al., 2023).
"""

from __future__ import annotations

from random import Random

from model.prompt import PromptTokenizer
from training.default_data.split import is_held_out

ONSETS = (
    "b",
    "bl",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "sn",
    "t",
    "tr",
    "v",
    "w",
    "z",
)
VOWELS = ("a", "e", "i", "o", "u", "oo", "ai")
CODAS = ("", "b", "d", "f", "g", "k", "l", "m", "n", "p", "rt", "sk", "t", "x", "zz")
NUM_WORDS = 1600


def _invent_words() -> tuple[str, ...]:
    rng = Random("words")
    words: dict[str, None] = {}
    while len(words) < NUM_WORDS:
        syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 2, 2)))]
        if 3 <= len(word := "".join(syllables)) <= 8:
            words[word] = None
    return tuple(words)


WORDS = _invent_words()
TRAINED_WORDS = tuple(word for word in WORDS if not is_held_out(word))
HELD_OUT_WORDS = tuple(word for word in WORDS if is_held_out(word))


def common_words(tokenizer: PromptTokenizer) -> tuple[str, ...]:
    """Return lower-case words of three or more letters that are one token after a space.

    There are none if the vocabulary's tokens hold no space.
    """
    tokens = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    words = (token[1:] for token in tokens if token.startswith(" "))
    excluded = set(HELD_OUT_WORDS)
    return tuple(w for w in words if len(w) > 2 and w.isascii() and w.isalpha() and w.islower() and w not in excluded)


def vocabularies(tokenizer: PromptTokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return invented words and common words; without common words, the invented words twice."""
    return TRAINED_WORDS, common_words(tokenizer) or TRAINED_WORDS
