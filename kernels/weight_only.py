"""Products of activations with weights in 8 or 4 bits, which the kernel unpacks to the activations' dtype.

int8 has a scale per output feature; int4 has groups of 32 columns, with a scale and a zero: w = (q - 8) * scale + zero.
Weights are unpacked in the reference, in the product of few rows, and as a whole matrix for many rows, whose product is
compute-bound and left to torch. All three give the same bits.

torch's own kernels are not suitable. On a GPU, `_weight_int8pack_mm` needs float32 and uses no matrix unit. The layout of
`_weight_int4pack_mm` can be unpacked by no other function, and it unpacks all weights for each 16 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_triton
from kernels.weight_only_gpu import multiply_int4, multiply_int8, unpack_int4, unpack_int8

GROUP = 32
# above this number of rows a matrix is unpacked as a whole
MAX_ROWS = 256


def quantise_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise groups of 32 weights: [N, K] -> q int32 [N, K] in 0..15, and (scale, zero) bfloat16 [K / 32, N, 2].

    The smallest and the largest weight of a group become 0 and 15, as in Q4_1, so that weights from Q4_1 keep their q.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))  # [N, K / 32, 32]
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12)
    q = (groups - low).div_(scale).round_().clamp_(0, 15)
    constants = torch.cat([scale, low + 8 * scale], dim=-1)  # [N, K / 32, 2]
    return q.flatten(-2).to(torch.int32), constants.transpose(0, 1).to(torch.bfloat16).contiguous()


def pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise and pack a matrix [N, K]: -> uint8 [K / 64, N, 32], and scales and zeros, bfloat16 [K / 32, N, 2].

    Of two neighbouring groups, a byte has a column of the first one in its low bits and one of the second in its high bits.
    """
    q, constants = quantise_groups(weight)
    low, high = q.to(torch.uint8).unflatten(1, (-1, 2, GROUP)).unbind(2)  # [N, K / 64, 32]
    return (low | high << 4).transpose(0, 1).contiguous(), constants


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of a matrix [N, K]: -> int8 of that shape, and a scale [N] float32."""
    scale = weight.float().abs().amax(-1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def unpack_int8_reference(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.float() * scale[:, None]).to(dtype)


def unpack_int4_reference(packed: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    groups = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1)  # [K / 32, N, 32]
    scale, zero = constants.float().split(1, -1)  # [K / 32, N, 1]
    return ((groups.float() - 8) * scale + zero).transpose(0, 1).flatten(1).to(dtype)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply x [T, K] by the weights of `quantise_int8`: -> [T, N]. On a GPU, K is a multiple of 64."""
    if not use_triton(x):
        return F.linear(x, unpack_int8_reference(weight, scale, x.dtype))
    if len(x) > MAX_ROWS:
        return F.linear(x, unpack_int8(weight, scale, x.dtype))
    return multiply_int8(x, weight, scale)


def int4_linear(x: Tensor, packed: Tensor, constants: Tensor) -> Tensor:
    """Multiply x [T, K] by the weights of `pack_int4`: -> [T, N]. K is a multiple of 64."""
    if not use_triton(x):
        return F.linear(x, unpack_int4_reference(packed, constants, x.dtype))
    if len(x) > MAX_ROWS:
        return F.linear(x, unpack_int4(packed, constants, x.dtype))
    return multiply_int4(x, packed, constants)
