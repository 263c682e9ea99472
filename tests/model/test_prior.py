"""A model's prior: the method by the number of examples per label, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from model.config import ConfigError
from model.prior import NEAREST_MEAN, PRIOR, LikenessMethodName, Prior, load_prior
from model.zoo.default import PRIOR_FILE
from server.fewshot.methods import METHODS

STEPS = Prior({1: "nearest_mean", 3: "knn", 10: "linear"})


@pytest.mark.parametrize(
    ("per_label", "expected"), [(1, "nearest_mean"), (2.9, "nearest_mean"), (3, "knn"), (9.5, "knn"), (100, "linear")]
)
def test_a_method_is_the_best_from_its_number_of_examples_on(per_label: float, expected: str) -> None:
    assert STEPS.method(per_label, METHODS) == expected


def test_a_method_that_is_not_allowed_is_replaced_by_that_of_fewer_examples() -> None:
    assert STEPS.method(100, {"nearest_mean", "knn"}) == "knn"
    assert Prior({1: "linear"}).method(100, {"nearest_mean", "knn"}) == "nearest_mean"


def test_its_methods_are_those_of_the_server() -> None:
    assert set(get_args(LikenessMethodName)) == METHODS.keys()


def test_a_prior_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / PRIOR).write_text(STEPS.to_json())
    assert load_prior(tmp_path) == STEPS


def test_a_model_without_a_prior_has_the_nearest_mean(tmp_path: Path) -> None:
    assert load_prior(tmp_path) == NEAREST_MEAN


def test_the_default_model_has_a_prior() -> None:
    assert 1 in load_prior(PRIOR_FILE.parent).methods


@pytest.mark.parametrize(
    "text", ["", "[]", '{"methods": {"1": "forest"}}', '{"methods": {"one": "knn"}}', '{"method": 1}']
)
def test_a_file_that_is_no_prior_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / PRIOR).write_text(text)
    with pytest.raises(ConfigError, match=PRIOR):
        load_prior(tmp_path)
