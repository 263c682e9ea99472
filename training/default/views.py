"""Computes random views of an image from its cached features: mirrored, shifted by one position, channels rescaled.

They replace mirrored, cropped and recoloured pixels, which the encoder would have to encode again at every step.
"""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

MIRROR_PROBABILITY = 0.5
JITTER = 0.1  # the standard deviation of a channel's log-gain


def random_view(features: Tensor, rng: Random) -> Tensor:  # [F, P, Dv], P a square number -> the same shape
    side = round(features.shape[1] ** 0.5)
    grid = features.float().permute(0, 2, 1).unflatten(2, (side, side))  # [F, Dv, y, x]
    if rng.random() < MIRROR_PROBABILITY:
        grid = grid.flip(3)
    grid = _shift(grid, rng.randint(-1, 1), rng.randint(-1, 1))
    gains = torch.randn(grid.shape[1], generator=torch.Generator().manual_seed(rng.getrandbits(63)))
    grid = grid * (JITTER * gains).exp()[None, :, None, None]
    return grid.flatten(2).permute(0, 2, 1).to(features.dtype)


def _shift(grid: Tensor, down: int, right: int) -> Tensor:
    """Shift the grid by at most one position; the free side repeats the border."""
    side = grid.shape[-1]
    padded = F.pad(grid, (1, 1, 1, 1), mode="replicate")
    return padded[..., 1 - down : 1 - down + side, 1 - right : 1 - right + side]
