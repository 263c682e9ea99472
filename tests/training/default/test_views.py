"""A view is another picture of the same thing: each change alone can be read back from the places and the channels."""

from __future__ import annotations

from random import Random

import pytest
import torch

from training.default import views
from training.default.views import view


class Drawn(Random):
    """Draws what it is told."""

    def __init__(self, mirrored: bool, down: int, right: int) -> None:
        super().__init__(0)
        self._mirrored, self._moves = mirrored, [down, right]

    def random(self) -> float:
        return 0.0 if self._mirrored else 0.9

    def randint(self, a: int, b: int) -> int:
        return self._moves.pop(0)


@pytest.fixture
def places() -> torch.Tensor:
    return torch.arange(9.0).repeat(2, 4, 1).permute(0, 2, 1).contiguous()  # [2, 9, 4]: each place holds its number


@pytest.mark.parametrize(
    ("mirrored", "down", "right", "expected"),
    [
        (False, 0, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (True, 0, 0, [2, 1, 0, 5, 4, 3, 8, 7, 6]),
        (False, 1, 0, [0, 1, 2, 0, 1, 2, 3, 4, 5]),
        (False, 0, -1, [1, 2, 2, 4, 5, 5, 7, 8, 8]),
    ],
)
def test_places_move(
    monkeypatch: pytest.MonkeyPatch, places: torch.Tensor, mirrored: bool, down: int, right: int, expected: list[int]
) -> None:
    monkeypatch.setattr(views, "JITTER", 0.0)
    seen = view(places, Drawn(mirrored, down, right))
    assert seen.shape == places.shape
    assert (seen == torch.tensor(expected, dtype=torch.float32)[None, :, None]).all()


def test_a_channel_has_one_gain_near_one(places: torch.Tensor) -> None:
    ones = torch.ones(2, 9, 1000, dtype=torch.float16)
    seen = view(ones, Random(5))
    assert seen.dtype == torch.float16
    assert (seen == seen[:1, :1]).all()
    assert 0.05 < float(seen[0, 0].float().log().std()) < 0.2


def test_a_seed_is_a_view(places: torch.Tensor) -> None:
    assert torch.equal(view(places, Random(3)), view(places, Random(3)))
    assert len({view(places, Random(seed)).numpy().tobytes() for seed in range(8)}) == 8
