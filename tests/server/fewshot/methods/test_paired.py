"""The sign test and the lead of paired comparisons, against values computed by hand."""

from __future__ import annotations

from math import erfc, sqrt

import numpy as np
import pytest

from server.fewshot.methods.paired import Paired


def of_counts(wins: int, losses: int) -> Paired:
    return Paired.of([1] * wins + [0] * losses, [0] * wins + [1] * losses)


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (10, 2, 2 * (1 + 12 + 66) / 4096), (3, 3, 1.0), (0, 5, 2 / 32)],
)
def test_the_sign_test(wins: int, losses: int, expected: float) -> None:
    assert of_counts(wins, losses).p_value == pytest.approx(expected)


def test_the_sign_test_of_many_is_the_normal_one() -> None:
    # a difference of 1.96 standard errors
    assert of_counts(50_980, 49_020 + 360).p_value > 1e-7
    assert of_counts(5098, 4902).p_value == pytest.approx(0.05, abs=0.002)


def test_only_examples_that_one_answers_count() -> None:
    first = np.array([True, True, True, False, False])
    second = np.array([True, False, False, True, False])
    assert Paired.of(first, second) == Paired(2, 1, 1.0, 3.0)
    assert Paired.of(np.array([0.5, 1.0, 0.0]), np.array([0.25, 1.0, 0.5])) == Paired(1, 1, -0.25, 0.3125)


def test_a_lead_is_in_standard_errors_and_one_example_is_no_lead() -> None:
    assert of_counts(12, 2).lead == pytest.approx(10 / sqrt(16)) == -of_counts(2, 12).lead
    assert of_counts(1, 0).lead < 1 < of_counts(3, 0).lead
    assert of_counts(0, 0).lead == 0


def test_shares_of_repetitions_are_compared_fairly_with_single_answers() -> None:
    """Two equally good settings, of five seeds and of one: each is clearly better as rarely as by chance."""
    random = np.random.default_rng(0)
    leads = []
    for _ in range(400):
        repeated = (random.random((5, 200)) < 0.95).mean(0)
        paired = Paired.of(repeated, random.random(200) < 0.95)
        assert paired.has_shares
        leads.append(paired.lead)
    assert np.mean(leads) == pytest.approx(0, abs=0.2)
    assert 0.7 < np.std(leads) < 1.1
    assert np.mean([erfc(abs(lead) / sqrt(2)) < 0.05 for lead in leads]) < 0.08
    better = Paired.of((random.random((5, 200)) < 0.96).mean(0), random.random(200) < 0.85)
    assert better.lead > 2.5
    assert better.p_value == pytest.approx(erfc(better.lead / sqrt(2)))
