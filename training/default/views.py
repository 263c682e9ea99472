"""Other views of an image, made from its cached features: mirrored, moved by a place, its channels a little stronger or
weaker.

Standing in for mirrored, cropped and recoloured pixels, which would have to go through the encoder again at every step.
"""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

MIRRORED = 0.5
JITTER = 0.1  # deviation of a channel's log-gain


def view(features: Tensor, rng: Random) -> Tensor:  # [F, P, Dv], a square of places -> the same shape
    side = round(features.shape[1] ** 0.5)
    grid = features.float().permute(0, 2, 1).unflatten(2, (side, side))  # [F, Dv, y, x]
    if rng.random() < MIRRORED:
        grid = grid.flip(3)
    grid = _moved(grid, rng.randint(-1, 1), rng.randint(-1, 1))
    gains = torch.randn(grid.shape[1], generator=torch.Generator().manual_seed(rng.getrandbits(63)))
    grid = grid * (JITTER * gains).exp()[None, :, None, None]
    return grid.flatten(2).permute(0, 2, 1).to(features.dtype)


def _moved(grid: Tensor, down: int, right: int) -> Tensor:
    """What moves out is lost; the border is repeated where nothing comes in."""
    side = grid.shape[-1]
    padded = F.pad(grid, (1, 1, 1, 1), mode="replicate")
    return padded[..., 1 - down : 1 - down + side, 1 - right : 1 - right + side]
