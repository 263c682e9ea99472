"""Words for names that only a prompt can teach: made-up ones, of which a fifth is never trained on, and words of the
language that do not fit the picture (symbol tuning, Wei et al., 2023), so that no word is likelier than another."""

from __future__ import annotations

from random import Random

from model.tokenizer import PromptTokenizer
from training.default_data.split import held_out

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


def _make_words() -> tuple[str, ...]:
    rng = Random("words")
    words: dict[str, None] = {}
    while len(words) < NUM_WORDS:
        syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 2, 2)))]
        if 3 <= len(word := "".join(syllables)) <= 8:
            words[word] = None
    return tuple(words)


WORDS = _make_words()
TRAINED_WORDS = tuple(word for word in WORDS if not held_out(word))
HELD_OUT_WORDS = tuple(word for word in WORDS if held_out(word))


def common_words(tokenizer: PromptTokenizer) -> tuple[str, ...]:
    """Lower-case words of three letters or more that are one token behind a space; none where tokens hold no space."""
    tokens = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    words = (token[1:] for token in tokens if token.startswith(" "))
    kept = set(HELD_OUT_WORDS)
    return tuple(w for w in words if len(w) > 2 and w.isascii() and w.isalpha() and w.islower() and w not in kept)


def vocabularies(tokenizer: PromptTokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Made-up words, and common ones, or made-up ones again where there are none."""
    return TRAINED_WORDS, common_words(tokenizer) or TRAINED_WORDS
