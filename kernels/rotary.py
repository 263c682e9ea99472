"""Rotary positions (RoFormer, half-split layout): the first `rotary_dim` elements of each head rotate by the token's angle.

A rotation is x * cos + (x with its halves swapped) * sin; the first half's sines are negative.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.backend import use_compiled
from kernels.compiled import compiled, inlined, load, store


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T, 1, rotary_dim] in float32; both halves hold the same angles."""
    angles = positions[:, None, None] * rotary_frequencies(rotary_dim, theta, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@cache
def rotary_frequencies(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor may take part in a backward pass later
        even = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
        return theta ** (-even / rotary_dim)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(width // 2, -1), sin)
    rotated, rest = x[..., :width], x[..., width:]
    rotated = torch.addcmul(rotated * cos, rotated.roll(width // 2, -1), sin)
    return torch.cat([rotated, rest], dim=-1)


@inlined
def rotate_heads(x, cos, sin, first, angle, num_heads, head_dim, rotary_dim):
    half = rotary_dim // 2
    for head in range(first, first + num_heads * head_dim, head_dim):
        for i in range(half):
            low, high = load(x, head + i), load(x, head + half + i)
            store(x, head + i, low * load(cos, angle + i) + high * load(sin, angle + i))
            store(x, head + half + i, high * load(cos, angle + half + i) + low * load(sin, angle + half + i))


@compiled("T* T* T* int int int int int")
def _rotate_rows(x, cos, sin, num_tokens, stride, num_heads, head_dim, rotary_dim):
    for row in range(num_tokens):
        rotate_heads(x, cos, sin, row * stride, row * rotary_dim, num_heads, head_dim, rotary_dim)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [T, H, K] rotated; x may be overwritten, unless a gradient needs it.

    cos and sin [T, 1, rotary_dim] are those of `rotary_angles`, in x's dtype.
    """
    num_tokens, num_heads, head_dim = x.shape
    if not use_compiled(x) or x.stride()[1:] != (head_dim, 1):
        return rotate_reference(x, cos, sin)
    _rotate_rows[x.dtype](
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), num_tokens, x.stride(0), num_heads, head_dim, cos.shape[-1]
    )
    return x
