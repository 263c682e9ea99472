"""Tests of the similarity loss, which is invariant to rotation, scale and offset of the representations."""

from __future__ import annotations

import torch

from training.default.similarity import neighbour_divergence, neighbour_log_probs


def rows(seed: int, count: int = 12, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_rotated_scaled_and_shifted_rows_have_no_divergence() -> None:
    target = rows(0)
    rotation, _ = torch.linalg.qr(rows(1, 8, 8))
    assert float(neighbour_divergence(3.0 * target @ rotation + 5.0, target)) < 1e-5


def test_unrelated_rows_diverge() -> None:
    assert float(neighbour_divergence(rows(2), rows(0))) > 0.5


def test_descent_restores_the_neighbours() -> None:
    target, learned = rows(0), rows(3, width=6).requires_grad_(True)
    optimizer = torch.optim.Adam([learned], lr=0.05)
    first = float(neighbour_divergence(learned, target).detach())
    for _ in range(150):
        optimizer.zero_grad()
        neighbour_divergence(learned, target).backward()
        optimizer.step()
    assert float(neighbour_divergence(learned, target).detach()) < 0.2 * first


def test_an_image_is_not_its_own_neighbour() -> None:
    log_probs = neighbour_log_probs(rows(0))
    assert log_probs.shape == (12, 11)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(12))
