"""Tests of the made language, its texts, and the decoder that learns to bind words in them."""

from __future__ import annotations

from random import Random

from tests.training.few_shot.language import language_tokenizer
from training.few_shot.language import NAMES, WORDS, draw_text, token_of


def test_each_name_and_word_is_one_token() -> None:
    tokens = {token_of(word, language_tokenizer()) for word in NAMES + WORDS}
    assert len(tokens) == len(NAMES) + len(WORDS)


def test_a_text_gives_each_name_one_word_and_marks_what_it_has_taught() -> None:
    for seed in range(20):
        words: dict[str, str] = {}
        for name, word, is_taught in draw_text(Random(seed)):
            assert is_taught == (name in words)
            assert words.setdefault(name, word) == word
        assert len(set(words.values())) == len(words)
