"""Tests of the default model's evaluation: balanced episodes, naming cases, perplexity and the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.binding import MEAN_IMAGE, Binding, sample_episodes
from evaluation.default import Options, format_table
from evaluation.intervals import Share, difference_to_best
from evaluation.naming import Naming, perplexity
from model.likeness import Vectors
from model.prompt import PromptTokenizer
from server.fewshot.methods import IN_CONTEXT
from tests.tiny_models import CONFIGS, prompt_tokenizer, tiny_model
from tests.training.default.data import make_folder
from training.default.catalogue import Catalogue
from training.default.words import HELD_OUT_WORDS
from training.default_data.split import is_held_out


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return Catalogue(make_folder(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return prompt_tokenizer()


def test_episodes_are_balanced_and_their_shots_exclude_the_query(catalogue: Catalogue) -> None:
    episodes = sample_episodes(catalogue.held_out_labels, 5, 3, 20, seed=0)
    assert sorted(episode.answer for episode in episodes) == sorted(list(range(5)) * 4)
    for episode in episodes:
        assert set(episode.words) <= set(HELD_OUT_WORDS)
        assert episode.query not in {row for row, _ in episode.shots}
        labels = [{catalogue.records[row].label for row, word in episode.shots if word == w} for w in range(5)]
        assert [len(label) for label in labels] == [1] * 5
        assert {catalogue.records[episode.query].label} == labels[episode.answer]
        for first in (0, 5, 10):
            assert sorted(word for _, word in episode.shots[first : first + 5]) == list(range(5))


def test_held_out_kinds_have_one_image_per_label(catalogue: Catalogue) -> None:
    for kind, rows in catalogue.held_out_kinds.items():
        assert is_held_out(kind)
        labels = [catalogue.records[row].label for row in rows]
        assert len(labels) == len(set(labels)) > 1


def test_too_few_categories_raise_an_error(catalogue: Catalogue) -> None:
    with pytest.raises(ValueError, match="categories have more than 99 images, 5 are needed"):
        sample_episodes(catalogue.held_out_labels, 5, 99, 1, seed=0)


def test_an_outcome_has_every_variant_and_number_of_rounds(catalogue: Catalogue, tokenizer: PromptTokenizer) -> None:
    binding = Binding(tiny_model(CONFIGS["flamingo"]), tokenizer, catalogue)
    (episode,) = sample_episodes(catalogue.photographs, 2, 3, 1, seed=0)
    is_correct = binding.judge(episode, (1, 3)).is_correct
    assert is_correct.keys() == {
        *("in_context", "shuffled", "blind", "real names", "nearest mean of features"),
        *("nearest_mean", "knn", "linear", "blend", "auto"),
    }
    assert all(set(by_rounds) == {1, 3} for by_rounds in is_correct.values())


def test_the_mean_image_is_the_query_if_all_shots_show_the_query(
    catalogue: Catalogue, tokenizer: PromptTokenizer
) -> None:
    binding = Binding(tiny_model(CONFIGS["flamingo"]), tokenizer, catalogue)
    (episode,) = sample_episodes(catalogue.photographs, 2, 2, 1, seed=0)
    same = replace(episode, shots=tuple((episode.query, word) for _, word in episode.shots))
    logs = binding.log_probabilities(same, 2, (IN_CONTEXT, MEAN_IMAGE))
    np.testing.assert_allclose(logs[MEAN_IMAGE], logs[IN_CONTEXT], rtol=1e-3)
    # each number of rounds has its own mean
    first = replace(episode, shots=tuple((episode.query, word) for _, word in episode.shots[:2]) + episode.shots[2:])
    logs = binding.log_probabilities(first, 1, (IN_CONTEXT, MEAN_IMAGE))
    np.testing.assert_allclose(logs[MEAN_IMAGE], logs[IN_CONTEXT], rtol=1e-3)
    logs = binding.log_probabilities(first, 2, (IN_CONTEXT, MEAN_IMAGE))
    assert not np.allclose(logs[MEAN_IMAGE], logs[IN_CONTEXT], rtol=1e-3)


def test_methods_by_likeness_answer_as_the_vectors_say(catalogue: Catalogue, tokenizer: PromptTokenizer) -> None:
    """With one hot vector per word, every method by likeness is right, and so is `auto`."""
    episodes = sample_episodes(catalogue.photographs, 2, 3, 6, seed=0)
    for episode in episodes:
        word_of = {**dict(episode.shots), episode.query: episode.answer}
        rows = {catalogue.pooled(row).numpy().tobytes(): word for row, word in word_of.items()}

        def likeness(pooled: Vectors, rows: dict[bytes, int] = rows) -> Vectors:
            return np.eye(2, dtype=np.float32)[[rows[vector.tobytes()] for vector in pooled]]

        binding = Binding(tiny_model(CONFIGS["flamingo"]), tokenizer, catalogue, likeness)
        is_correct = binding.judge(episode, (1, 3), ()).is_correct
        assert is_correct.keys() == {"nearest mean of features", "nearest_mean", "knn", "linear", "auto"}
        assert all(all(is_correct[name].values()) for name in ("nearest_mean", "knn", "linear", "auto"))


def test_a_difference_to_the_best_is_paired() -> None:
    answers = {"a": [True] * 8 + [False] * 2, "b": [True] * 2 + [False] * 8, "auto": [True] * 7 + [False] * 3}
    assert difference_to_best(answers, "auto").startswith("-0.100 [")
    assert difference_to_best(answers, "auto").endswith("(a)")


def test_naming_cases_use_held_out_images_and_their_label_comes_first(
    catalogue: Catalogue, tokenizer: PromptTokenizer
) -> None:
    naming = Naming(tiny_model(CONFIGS["flamingo"]), tokenizer, catalogue)
    for row, labels in naming.cases(10, 4, seed=0):
        assert catalogue.records[row].label == labels[0]
        assert len(set(labels)) == 4
        assert row in catalogue.unseen_images[labels[0]]
        assert isinstance(naming.is_named(row, labels, caption=True, blind=False), bool)


def test_closed_gates_leave_the_language_models_perplexity() -> None:
    open_model, closed, bare = (tiny_model(CONFIGS["flamingo"]) for _ in range(3))
    for name, gate in closed.named_parameters():
        if name.endswith("_gate"):
            gate.data.zero_()
    bare.gated.clear()
    ids = list(range(40))
    assert perplexity(closed, ids) == perplexity(bare, ids)
    assert perplexity(open_model, ids) != perplexity(bare, ids)


def test_the_table_shows_intervals_and_chance() -> None:
    rows = {"drawings, 5-way, 1 per word (5 in all)": {"model": Share(1, 2), "blind": Share(0, 2)}}
    assert format_table(rows, ("model", "blind"), chance=True).splitlines()[-1] == (
        "| drawings, 5-way, 1 per word (5 in all) | 0.500 [0.095, 0.905] | 0.000 [0.000, 0.658] | 0.20 |"
    )


@pytest.mark.parametrize(("controls", "judged"), [(None, True), (5, True), (0, False)])
def test_a_table_has_the_controls_that_are_judged(controls: int | None, judged: bool) -> None:
    options = Options(episodes=9, controls=controls, model=None, data=Path(), processes=1, dtype="float32")
    assert ("shuffled" in options.columns) == judged
    assert set(options.columns) >= set(options.variants_of(0))
