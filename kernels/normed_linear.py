# mypy: disable-error-code="no-untyped-def"
"""LayerNorm, linear layer and GELU in one pass over the weight, for the few rows of a decode step.

The norm is folded: with W' = W * gamma, norm(x) W^T = (x W'^T - mean(x) sum(W')) / std(x) + beta W^T, and the mean and
variance of x come out of the same loop. An experiment, taken where the benchmark says that it wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import jit_runtime, tl, triton, use_triton
from kernels.configs import launch_config
from kernels.norm import layer_norm_reference

MAX_ROWS = 64  # beyond, cuBLAS


@dataclass(frozen=True, slots=True)
class FoldedLinear:
    """Made once, at load, by `fold_norm`."""

    weight: Tensor  # [N, D], times the norm's weight
    row_sums: Tensor  # [N] float32, of that product as it was rounded
    bias: Tensor  # [N] float32, the norm's bias through the weight, and the layer's own


def fold_norm(weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None) -> FoldedLinear:
    """weight [N, D], bias [N], norm_weight, norm_bias [D]"""
    folded = (weight.float() * norm_weight.float()).to(weight.dtype)
    constant = weight.new_zeros(len(weight), dtype=torch.float32) if bias is None else bias.float()
    if norm_bias is not None:
        constant = constant + weight.float() @ norm_bias.float()
    return FoldedLinear(folded, folded.float().sum(1), constant)


Activation = Literal["none", "gelu"]


def normed_linear_reference(x: Tensor, folded: FoldedLinear, *, eps: float, activation: Activation = "none") -> Tensor:
    normed = layer_norm_reference(x.float(), x.new_ones(x.shape[1]), None, eps)
    y = normed @ folded.weight.float().T + folded.bias
    return (F.gelu(y) if activation == "gelu" else y).to(x.dtype)


@jit_runtime("num_rows")
def _normed_linear(
    x,
    weight,
    row_sums,
    bias,
    out,
    num_rows,
    N,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GELU: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK rows by BLOCK_N outputs; the weight streams by once."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # neighbours share a piece of the weight, out of the L2 cache
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real, there = rows < num_rows, outputs < N
    acc = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        columns = begin + tl.arange(0, BLOCK_D)
        inside = columns < D
        x_at, w_at = rows[:, None] * D + columns[None, :], outputs[:, None].to(tl.int64) * D + columns[None, :]
        a = tl.load(x + x_at, mask=real[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight + w_at, mask=there[:, None] & inside[None, :], other=0.0)
        acc += tl.dot(a, tl.trans(w), input_precision="ieee")
        wide = a.to(tl.float32)
        total += tl.sum(wide, 1)
        squares += tl.sum(wide * wide, 1)
    mean = total / D
    scale = tl.rsqrt(tl.maximum(squares / D - mean * mean, 0.0) + eps)
    sums = tl.load(row_sums + outputs, mask=there, other=0.0)
    y = (acc - mean[:, None] * sums[None, :]) * scale[:, None] + tl.load(bias + outputs, mask=there, other=0.0)[None, :]
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    at = rows[:, None].to(tl.int64) * N + outputs[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=real[:, None] & there[None, :])


def normed_linear(x: Tensor, folded: FoldedLinear, *, eps: float, activation: Activation = "none") -> Tensor:
    """x [T, D] -> [T, N]; the activation is the exact GELU."""
    num_rows, width = x.shape
    if not use_triton(x):
        y = F.linear(F.layer_norm(x, (width,), eps=eps), folded.weight, folded.bias.to(x.dtype))
        return F.gelu(y) if activation == "gelu" else y
    if num_rows > MAX_ROWS:
        raise ValueError(f"normed_linear is for at most {MAX_ROWS} rows, but was handed {num_rows}")
    num_outputs = len(folded.weight)
    config = launch_config("skinny", width, x.dtype)
    out = x.new_empty(num_rows, num_outputs)
    _normed_linear[(triton.cdiv(num_rows, config.block), triton.cdiv(num_outputs, 32))](
        x.contiguous(), folded.weight, folded.row_sums, folded.bias, out, num_rows, num_outputs, eps, D=width,
        BLOCK=config.block, BLOCK_N=32, BLOCK_D=128, GELU=activation == "gelu", STAGES=config.num_stages,
        **config.options,
    )  # fmt: skip
    return out
