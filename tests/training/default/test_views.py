"""Tests of random views: each change alone can be read from the positions and channels of the result."""

from __future__ import annotations

from random import Random

import pytest
import torch

from training.default import views
from training.default.views import random_view


class FixedRandom(Random):
    """A random generator that returns fixed values."""

    def __init__(self, mirrored: bool, down: int, right: int) -> None:
        super().__init__(0)
        self._mirrored, self._moves = mirrored, [down, right]

    def random(self) -> float:
        return 0.0 if self._mirrored else 0.9

    def randint(self, a: int, b: int) -> int:
        return self._moves.pop(0)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.arange(9.0).repeat(2, 4, 1).permute(0, 2, 1).contiguous()  # [2, 9, 4]: each position holds its index


@pytest.mark.parametrize(
    ("mirrored", "down", "right", "expected"),
    [
        (False, 0, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (True, 0, 0, [2, 1, 0, 5, 4, 3, 8, 7, 6]),
        (False, 1, 0, [0, 1, 2, 0, 1, 2, 3, 4, 5]),
        (False, 0, -1, [1, 2, 2, 4, 5, 5, 7, 8, 8]),
    ],
)
def test_positions_are_mirrored_and_shifted(
    monkeypatch: pytest.MonkeyPatch, features: torch.Tensor, mirrored: bool, down: int, right: int, expected: list[int]
) -> None:
    monkeypatch.setattr(views, "JITTER", 0.0)
    result = random_view(features, FixedRandom(mirrored, down, right))
    assert result.shape == features.shape
    assert (result == torch.tensor(expected, dtype=torch.float32)[None, :, None]).all()


def test_each_channel_has_one_gain_near_one(features: torch.Tensor) -> None:
    ones = torch.ones(2, 9, 1000, dtype=torch.float16)
    result = random_view(ones, Random(5))
    assert result.dtype == torch.float16
    assert (result == result[:1, :1]).all()
    assert 0.05 < float(result[0, 0].float().log().std()) < 0.2


def test_a_view_is_determined_by_its_seed(features: torch.Tensor) -> None:
    assert torch.equal(random_view(features, Random(3)), random_view(features, Random(3)))
    assert len({random_view(features, Random(seed)).numpy().tobytes() for seed in range(8)}) == 8
