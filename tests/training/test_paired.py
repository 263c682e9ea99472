"""Tests of the intervals over seeds and of the comparison of signs."""

from __future__ import annotations

import math

import pytest

from training.paired import SeedValues, differences


def test_the_interval_is_students() -> None:
    """Three values with mean 2 and deviation 1: the half width is 4.3027 / sqrt(3)."""
    low, high = SeedValues((1.0, 2.0, 3.0)).interval()
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_differences_are_of_the_same_seed() -> None:
    assert differences([3.0, 5.0], [1.0, 4.5]).values == (2.0, 0.5)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        differences([3.0], [1.0, 4.5])


@pytest.mark.parametrize(
    ("values", "expected", "verdict"),
    [
        ((-5.0, -5.2, -4.9), -7.2, "same"),
        ((-5.0, -5.2, -4.9), +7.2, "other"),
        ((5.0, 5.2, 4.9), -7.2, "other"),
        ((-5.0, 1.0, -9.0), -7.2, "undecided"),
        ((-5.0,), -7.2, "undecided"),
    ],
)
def test_an_interval_that_contains_zero_is_undecided(values: tuple[float, ...], expected: float, verdict: str) -> None:
    assert SeedValues(values).compare(expected) == verdict


def test_one_seed_has_no_interval() -> None:
    assert SeedValues((1.5,)).text() == "+1.5 [one seed]"


def test_equal_values_have_no_interval_of_no_width() -> None:
    assert SeedValues((1.0, 1.0, 1.0)).text(2, "") == "1.00 [all seeds equal]"


def test_the_interval_is_within_the_bounds_of_the_values() -> None:
    assert SeedValues((90.0, 95.0, 100.0)).interval()[1] > 100
    assert SeedValues((90.0, 95.0, 100.0), bounds=(0.0, 100.0)).interval()[1] == 100.0
    assert SeedValues((0.0, 1.0), bounds=(0.0, 100.0)).interval()[0] == 0.0
