"""Agreement costs nothing, whatever the turn and the length of the space; another order of neighbours does."""

from __future__ import annotations

import torch

from training.default.similarity import disagreement, neighbours


def rows(seed: int, count: int = 12, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_the_same_neighbours_cost_nothing() -> None:
    wanted = rows(0)
    turn, _ = torch.linalg.qr(rows(1, 8, 8))
    assert float(disagreement(3.0 * wanted @ turn + 5.0, wanted)) < 1e-5


def test_other_neighbours_do() -> None:
    assert float(disagreement(rows(2), rows(0))) > 0.5


def test_descent_brings_the_neighbours_back() -> None:
    wanted, seen = rows(0), rows(3, width=6).requires_grad_(True)
    optimizer = torch.optim.Adam([seen], lr=0.05)
    first = float(disagreement(seen, wanted).detach())
    for _ in range(150):
        optimizer.zero_grad()
        disagreement(seen, wanted).backward()
        optimizer.step()
    assert float(disagreement(seen, wanted).detach()) < 0.2 * first


def test_no_image_is_its_own_neighbour() -> None:
    found = neighbours(rows(0))
    assert found.shape == (12, 11)
    assert torch.allclose(found.exp().sum(-1), torch.ones(12))
