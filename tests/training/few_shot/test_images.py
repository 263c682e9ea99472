"""Tests of the episodes of images: at most five in training, and held-out labels in the questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.default.data import make_folder
from tests.training.few_shot.language import language_tokenizer
from training.default.catalogue import Catalogue, row_of
from training.default_data.split import is_held_out
from training.few_shot.episode import MAX_MEDIA
from training.few_shot.images import SHOTS, WAYS, TaughtImages, draw_questions, held_out_labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"), per_label=10)


@pytest.fixture(scope="module")
def catalogue(folder: Path) -> Catalogue:
    return Catalogue(folder)


def test_a_training_episode_has_five_images_of_trained_labels(catalogue: Catalogue) -> None:
    make = TaughtImages(catalogue, language_tokenizer(), seed=0)
    for number in range(30):
        tokens = make(number).tokens
        rows = [row_of(digest) for digest in tokens.media]
        assert len(set(rows)) == len(rows) == MAX_MEDIA
        labels = [catalogue.records[row].label for row in rows]
        assert not any(map(is_held_out, labels))
        words = tokens.token_ids[1::3]
        assert len({*zip(labels, words, strict=True)}) == len(set(labels)) == len(set(words))
        assert tokens.target[1::3] == [word in words[:position] for position, word in enumerate(words)]


def test_questions_show_held_out_labels_only(catalogue: Catalogue) -> None:
    labels = held_out_labels(catalogue)
    assert len(labels) >= WAYS
    for question in draw_questions(catalogue, language_tokenizer(), 10, 0, max(SHOTS)):
        rows = [row_of(digest) for digest in question.example.tokens.media]
        assert len(set(rows)) == len(rows) == max(SHOTS) + 1
        assert all(is_held_out(catalogue.records[row].label) for row in rows)
        assert not set(rows) & set(catalogue.training)


def test_a_longer_prompt_begins_with_a_shorter_one_and_has_the_same_query(catalogue: Catalogue) -> None:
    tokenizer = language_tokenizer()
    questions = {count: list(draw_questions(catalogue, tokenizer, 10, 0, count)) for count in SHOTS}
    for number in range(10):
        longest = questions[max(SHOTS)][number].example.tokens
        for count in SHOTS:
            question = questions[count][number]
            tokens = question.example.tokens
            assert tokens.token_ids[: 3 * count] == longest.token_ids[: 3 * count]
            assert tokens.media == [*longest.media[:count], longest.media[-1]]
            assert sum(tokens.target) == 1
            assert tokens.token_ids[3 * count + 1] == question.candidates[question.correct]
            words = tokens.token_ids[1 : 3 * count : 3]
            assert [words.count(word) for word in question.candidates] == [count // WAYS] * WAYS or count % WAYS


def test_other_seeds_ask_other_queries(catalogue: Catalogue) -> None:
    first, second = (
        [question.example.tokens.media for question in draw_questions(catalogue, language_tokenizer(), 5, seed, 4)]
        for seed in (0, 1)
    )
    assert first != second
