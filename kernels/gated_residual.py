"""The gated residual x + tanh(gate) * branch, by which a gated layer joins the language model (Flamingo, figure 4).

It serves training and models whose gates are not folded into the branch's last weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import jit, jit_runtime, tl, triton, use_triton
from kernels.configs import launch_config

WIDTH = 1024  # columns per program
ROWS = 32  # rows that one program of the backward pass sums


def gated_residual_reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + gate.float().tanh() * branch.float()).to(x.dtype)


@jit
def _forward(x, branch, factor, out, D, SCALAR: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    at = tl.program_id(0).to(tl.int64) * D + columns
    t = tl.load(factor) if SCALAR else tl.load(factor + columns, mask=mask, other=0.0)
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    y += t * tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@jit_runtime("num_rows")
def _backward(
    grad_out, branch, factor, grad_branch, grad_factor, num_rows, D, SCALAR: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The branch's gradient, and the factor's summed over ROWS rows: [rows / ROWS, D], which torch sums up."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    t = tl.load(factor) if SCALAR else tl.load(factor + columns, mask=mask, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * ROWS
    for row in range(0, tl.minimum(num_rows - first, ROWS)):
        at = first.to(tl.int64) * D + row * D + columns
        grad = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        total += grad * tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_branch + at, (grad * t).to(grad_branch.dtype.element_ty), mask=mask)
    tl.store(grad_factor + tl.program_id(0).to(tl.int64) * D + columns, total, mask=mask)


class _GatedResidual(torch.autograd.Function):
    """The kernels take tanh(gate) as `factor`; torch computes the tanh and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factor: Tensor) -> Tensor:
        num_rows, width = x.shape
        out = torch.empty_like(x)
        _forward[(num_rows, triton.cdiv(width, WIDTH))](
            x, branch, factor, out, width, SCALAR=factor.numel() == 1, BLOCK=WIDTH,
            **launch_config("row", width, x.dtype).options,
        )  # fmt: skip
        ctx.save_for_backward(branch, factor)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        branch, factor = ctx.saved_tensors
        num_rows, width = branch.shape
        grad_out, grad_branch = grad_out.contiguous(), torch.empty_like(branch)
        sums = factor.new_empty(triton.cdiv(num_rows, ROWS), width)
        _backward[(len(sums), triton.cdiv(width, WIDTH))](
            grad_out, branch, factor, grad_branch, sums, num_rows, width, SCALAR=factor.numel() == 1, BLOCK=WIDTH,
            ROWS=ROWS, **launch_config("row", width, branch.dtype).options,
        )  # fmt: skip
        grad_factor = sums.sum(0) if factor.numel() > 1 else sums.sum().view(1)
        return grad_out, grad_branch, grad_factor


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + tanh(gate) * branch: x [T, D], branch [T, D], gate [1] or [D] -> [T, D]."""
    if not use_triton(x):
        return gated_residual_reference(x, branch, gate)
    out: Tensor = _GatedResidual.apply(x.contiguous(), branch.contiguous(), gate.float().tanh())
    return out
