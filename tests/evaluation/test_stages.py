"""Tests of the stages of the default model: the nearest mean by vectors, the votes of the heads, and the table."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation import stages
from evaluation.binding import MEAN_IMAGE, Episode, sample_episodes
from evaluation.stages import ANSWER, CALIBRATED, COLUMNS, VECTORS, VOTES, Stages, format_rows
from server.fewshot.methods import IN_CONTEXT
from tests.tiny_models import CONFIGS, prompt_tokenizer, tiny_model
from tests.training.default.data import make_folder
from training.default.catalogue import Catalogue
from training.default.discriminants import fit_discriminants


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def judge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    # a random model has no heads that look up names, and its tokens are bytes, of which a probe has too many
    monkeypatch.setattr(stages, "probe_sequences", lambda _: [])
    monkeypatch.setattr(stages, "find_name_heads", lambda *_: {0: torch.tensor([0, 1]), 1: torch.tensor([0])})
    model = tiny_model(CONFIGS["flamingo"])
    return Stages(model, prompt_tokenizer(), Catalogue(folder), fit_discriminants(folder, model.config.resampler.dim))


@pytest.fixture
def episode(judge: Stages) -> Episode:
    (episode,) = sample_episodes(judge._catalogue.photographs, 2, 2, 1, seed=0)
    return episode


def test_an_episode_is_judged_at_every_stage(judge: Stages, episode: Episode) -> None:
    assert judge.judge(episode, 2).keys() == set(COLUMNS)


@pytest.mark.parametrize("name", VECTORS)
def test_a_query_with_the_vector_of_a_shot_is_answered_by_its_word(name: str, judge: Stages, episode: Episode) -> None:
    vectors = {row: {of: torch.zeros(2) for of in VECTORS} for row, _ in episode.shots}
    for row, word in episode.shots:
        vectors[row][name] = torch.eye(2)[word] + 7
    for word in (0, 1):
        judge._vectors = {**vectors, episode.query: {**vectors[episode.shots[0][0]], name: torch.eye(2)[word] + 7}}
        assert judge.judge(episode, 2)[name] == (word == episode.answer)


@pytest.mark.parametrize(
    "scores", [[3.0, 1.0, 0.0, 0.0], [1.0, 1.4, 1.4, 1.5], [0.0, 0.0, 2.0, 2.5], [0.0, 2.0, 0.0, 0.0]]
)
def test_a_word_gets_the_weights_of_all_its_names(
    scores: list[float], judge: Stages, episode: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> tuple[Tensor, Tensor]:
        by_head = torch.zeros(3, 5, 5)
        by_head[:, -1] = torch.tensor([*scores, 9.0])  # the last name is the query's own, which does not count
        by_head[1] += 1.5
        return torch.zeros(0), by_head

    monkeypatch.setattr(stages, "forward_with_scores", forward)
    votes = [0.0, 0.0]
    for score, (_, word) in zip(scores, episode.shots, strict=True):
        votes[word] += math.exp(score)
    assert judge._votes(episode, 2) == votes.index(max(votes))


def test_the_last_column_halves_the_preference_for_a_word(
    judge: Stages, episode: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = episode.answer
    in_context, mean_image = np.array([-1.0, -1.0]), np.array([-9.0, -9.0])
    in_context[answer], mean_image[answer] = -2.0, -12.0
    logs = {IN_CONTEXT: in_context, MEAN_IMAGE: mean_image}
    monkeypatch.setattr(judge._binding, "log_probabilities", lambda *_: logs)
    judged = judge.judge(episode, 2)
    assert (judged[ANSWER], judged[CALIBRATED]) == (False, True)
    mean_image[answer] = -10.0  # a small preference does not outweigh the image
    judged = judge.judge(episode, 2)
    assert (judged[ANSWER], judged[CALIBRATED]) == (False, False)


def test_the_table_has_a_row_per_set_of_images_and_a_column_per_stage() -> None:
    row = {column: [column in (VOTES, ANSWER), False] for column in COLUMNS}
    head, _, line = format_rows({"drawings, 1": row}).splitlines()
    assert head == (
        "| images, shots per word | discriminants | visual tokens | early states | votes of the heads | answer | "
        "answer, preference halved |"
    )
    assert [cell.strip()[:5] for cell in line.split("|")[2:-1]] == ["0.000"] * 3 + ["0.500"] * 2 + ["0.000"]
