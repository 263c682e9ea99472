"""Tests of what is measured in process: episodes of held-out images, the choice of a prior, and the bias of estimates."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evaluation import estimates, prior
from evaluation.bias import Comparison, summarise
from evaluation.held_out import LARGEST_EPISODE, MAX_QUERIES, Domain, Unreported, load_domains
from evaluation.intervals import Share
from model.prior import PRIOR, load_prior
from server.fewshot.methods import METHODS
from server.quality.measures import wilson
from tests.training.default.data import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def domains(folder: Path) -> list[Domain]:
    return load_domains(folder, folder)


def rows(vectors: np.ndarray) -> set[bytes]:
    return {vector.tobytes() for vector in vectors}


def test_episodes_have_as_many_examples_and_queries_of_each_label(domains: Sequence[Domain]) -> None:
    for domain in domains[:2]:
        episodes = list(domain.episodes(5, 3, 4, "test"))
        assert len(episodes) == 4
        for episode in episodes:
            assert set(episode.examples.counts()) == {3}
            assert len(set(episode.queries.counts())) == 1
            assert 1 <= episode.queries.counts()[0] <= MAX_QUERIES
            assert rows(episode.examples.vectors).isdisjoint(rows(episode.queries.vectors))


def test_there_is_no_episode_of_too_few_images(domains: Sequence[Domain]) -> None:
    assert not list(domains[0].episodes(5, 8, 4, "test"))


def test_what_is_chosen_is_chosen_on_images_that_no_evaluation_reports(folder: Path) -> None:
    unreported = Unreported.load(folder, folder)
    catalogue = unreported.catalogue
    used = {row for categories in unreported.categories.values() for rows in categories.values() for row in rows}
    assert used.isdisjoint(row for rows in catalogue.held_out_labels.values() for row in rows)
    assert used.isdisjoint(
        row for rows in catalogue.photographs.values() if len(rows) > LARGEST_EPISODE for row in rows
    )
    assert [domain.name for domain in unreported.domains()] == ["drawings", "kinds of drawings"]


def test_the_simplest_method_is_chosen_unless_another_is_clearly_better() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 200)
    shares = {"nearest_mean": list(0.8 + noise), "knn": [0.7] * 200, "linear": list(0.801 - noise)}
    assert prior.choose([shares]) == "nearest_mean"
    assert prior.choose([shares | {"linear": list(0.9 + noise)}]) == "linear"


def test_a_prior_is_printed_and_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prior, "PRIOR_FILE", tmp_path / PRIOR)
    options = ["--model", str(folder), "--data", str(folder), "--episodes", "3", "--ways", "3", "--per-label", "1", "3"]
    monkeypatch.setattr(sys, "argv", ["prior", *options, "--write"])
    prior.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| examples per label | nearest_mean | knn | linear | chosen |"
    assert "| | nearest_mean | knn | linear | auto | auto less the best |" in lines
    assert {str(number): method for number, method in load_prior(tmp_path).methods.items()} == json.loads(lines[-1])[
        "methods"
    ]
    assert set(json.loads(lines[-1])["shares"]["drawings, 3-way, 3 per label"]) == {*METHODS, "auto"}


def test_estimates_of_random_vectors_are_at_chance_and_unbiased(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder), "--data", str(folder), "--sets", "40", "--ways", "4", "--per-label", "3"]
    monkeypatch.setattr(sys, "argv", ["estimates", *options])
    estimates.main()
    settings = {row["setting"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]}
    for method in METHODS:
        row = settings[f"drawings, 3 per label, {method}"]
        assert (row["sets"], row["truth"]) == (40, pytest.approx(0.25, abs=0.06))
        assert abs(row["bias"]) < 0.06
        assert row["covered"] > 0.85


def test_an_interval_is_right_within_the_error_of_the_fresh_images() -> None:
    def comparison(correct: int, fresh: int) -> Comparison:
        return Comparison("knn", None, Share(correct, 20), wilson(correct, 20), Share(fresh, 20))

    assert comparison(10, 10).is_covered
    assert comparison(10, 5).is_covered  # outside of the interval, but 20 images say little
    assert not comparison(10, 4).is_covered
    assert comparison(20, 17).is_covered
    assert not comparison(20, 13).is_covered
    assert summarise([comparison(10, 10), comparison(10, 4)])["covered"] == 0.5
