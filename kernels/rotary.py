"""Rotary positions (RoFormer, half-split layout): the first `rotary_dim` numbers of each head are turned by their token's
angles, the others stay. A turn is x * cos + (x with its halves swapped) * sin; the first half's sines are negative."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.backend import use_compiled
from kernels.compiled import compiled, inlined, load, store


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, rotary_dim], in float32: both halves carry the same angles."""
    angles = positions[:, None, None] * rotary_frequencies(rotary_dim, theta, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@cache
def rotary_frequencies(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a gradient may be wanted beside it later
        even = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
        return theta ** (-even / rotary_dim)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(width // 2, -1), sin)
    turned, rest = x[..., :width], x[..., width:]
    turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), sin)
    return torch.cat([turned, rest], dim=-1)


@inlined
def turn_heads(x, cos, sin, first, angle, num_heads, head_dim, rotary_dim):
    half = rotary_dim // 2
    for head in range(first, first + num_heads * head_dim, head_dim):
        for i in range(half):
            one, other = load(x, head + i), load(x, head + half + i)
            store(x, head + i, one * load(cos, angle + i) + other * load(sin, angle + i))
            store(x, head + half + i, other * load(cos, angle + half + i) + one * load(sin, angle + half + i))


@compiled("T* T* T* int int int int int")
def _rotate_rows(x, cos, sin, num_tokens, stride, num_heads, head_dim, rotary_dim):
    for row in range(num_tokens):
        turn_heads(x, cos, sin, row * stride, row * rotary_dim, num_heads, head_dim, rotary_dim)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, K], cos and sin [T, 1, rotary_dim] as `rotary_angles` gives them, in x's dtype -> [T, H, K]. `x` is given
    away: where no gradient needs it, it is turned in place."""
    num_tokens, num_heads, head_dim = x.shape
    if not use_compiled(x) or x.stride()[1:] != (head_dim, 1):
        return rotate_reference(x, cos, sin)
    _rotate_rows[x.dtype](
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), num_tokens, x.stride(0), num_heads, head_dim, cos.shape[-1]
    )
    return x
