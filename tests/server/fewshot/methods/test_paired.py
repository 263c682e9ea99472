"""The sign test and the lead of paired comparisons, against values computed by hand."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from server.fewshot.methods.paired import Paired


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (10, 2, 2 * (1 + 12 + 66) / 4096), (3, 3, 1.0), (0, 5, 2 / 32)],
)
def test_the_sign_test(wins: int, losses: int, expected: float) -> None:
    assert Paired(wins, losses).p_value == pytest.approx(expected)


def test_the_sign_test_of_many_is_the_normal_one() -> None:
    # a difference of 1.96 standard errors
    assert Paired(50_980, 49_020 + 360).p_value > 1e-7
    assert Paired(5098, 4902).p_value == pytest.approx(0.05, abs=0.002)


def test_only_examples_that_one_answers_count() -> None:
    first = np.array([True, True, True, False, False])
    second = np.array([True, False, False, True, False])
    assert Paired.of(first, second) == Paired(2, 1)
    assert Paired.of(np.array([0.5, 1.0, 0.0]), np.array([0.25, 1.0, 0.5])) == Paired(1, 1)


def test_a_lead_is_in_standard_errors_and_one_example_is_no_lead() -> None:
    assert Paired(12, 2).lead == pytest.approx(10 / sqrt(16)) == -Paired(2, 12).lead
    assert Paired(1, 0).lead < 1 < Paired(3, 0).lead
    assert Paired(0, 0).lead == 0
