"""Operators on each row of a matrix: norms, residual sums, SwiGLU and the greedy argmax.

Only the gated residual has kernels for both directions; the gradients of the other operators come from torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import jit, jit_runtime, launch_config, needs_gradients, tl, triton, use_compiled, use_triton
from kernels.compiled import compiled, exp, inlined, load, ordered_bits, store

WIDTH = 1024  # columns per program of the gated residual
ROWS = 32  # rows that one program of the gated residual's backward pass sums
SWIGLU_WIDTH = 2048  # columns per program of SwiGLU: loads of 16 bytes per thread on every target


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y * weight.float()).to(x.dtype)


def add_rms_norm_reference(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x + branch
    return h, rms_norm_reference(h, weight, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = x.float()
    y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    h = x + branch
    return h, layer_norm_reference(h, weight, bias, eps)


@jit
def _normed(y, weight, bias, columns, mask, eps, D: tl.constexpr, CENTRE: tl.constexpr):
    """Normalise a row of float32, whose columns outside of the mask are 0."""
    if CENTRE:
        y = tl.where(mask, y - tl.sum(y, 0) / D, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps) * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return y


@jit
def _norm_row(x, weight, bias, out, stride, eps, D: tl.constexpr, BLOCK: tl.constexpr, CENTRE: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = columns < D
    y = tl.load(x + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    y = _normed(y, weight, bias, columns, mask, eps, D, CENTRE)
    tl.store(out + row * D + columns, y.to(out.dtype.element_ty), mask=mask)


@jit
def _add_norm_row(
    x, branch, weight, bias, total, out, eps, D: tl.constexpr, BLOCK: tl.constexpr, CENTRE: tl.constexpr
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    mask, at = columns < D, tl.program_id(0).to(tl.int64) * D + columns
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    h = y.to(total.dtype.element_ty)
    tl.store(total + at, h, mask=mask)
    y = _normed(h.to(tl.float32), weight, bias, columns, mask, eps, D, CENTRE)  # the norm is that of the rounded sum
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def _norm_rows(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centre: bool) -> Tensor:
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty(rows.shape)
    _norm_row[(len(rows),)](
        rows, weight, bias, out, rows.stride(0), eps, D=width, BLOCK=triton.next_power_of_2(width), CENTRE=centre,
        **launch_config("row", width, x.dtype).options,
    )  # fmt: skip
    return out.view(x.shape)


def _add_norm_rows(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centre: bool
) -> tuple[Tensor, Tensor]:
    x, branch, width = x.contiguous(), branch.contiguous(), x.shape[-1]
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_norm_row[(x.numel() // width,)](
        x, branch, weight, bias, total, out, eps, D=width, BLOCK=triton.next_power_of_2(width), CENTRE=centre,
        **launch_config("row", width, x.dtype).options,
    )  # fmt: skip
    return total, out


@inlined
def norm_row(x, weight, out, first, width, eps):
    total = np.float32(0)
    for i in range(first, first + width):
        value = load(x, i)
        total += value * value
    scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
    for i in range(width):
        store(out, first + i, load(x, first + i) * scale * weight[i])


@compiled("T* float32* T* int int float")
def _rms_rows(x, weight, out, num_rows, width, eps):
    for first in range(0, num_rows * width, width):
        norm_row(x, weight, out, first, width, eps)


@compiled("T* T* float32* T* T* int int float")
def _add_rms_rows(x, branch, weight, total, out, num_rows, width, eps):
    for first in range(0, num_rows * width, width):
        for i in range(first, first + width):
            store(total, i, load(x, i) + load(branch, i))
        norm_row(total, weight, out, first, width, eps)


def _kernel_serves(x: Tensor, *tensors: Tensor | None) -> bool:
    return use_triton(x) and not needs_gradients(x, *tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm of x [..., D]; weight [D] is of x's dtype or float32."""
    if _kernel_serves(x, weight):
        return _norm_rows(x, weight, None, eps, centre=False)
    if use_compiled(x, weight):
        x, weight, width = x.contiguous(), weight.float(), x.shape[-1]
        out = torch.empty_like(x)
        _rms_rows[x.dtype](x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
        return out
    if weight.dtype != x.dtype:
        return rms_norm_reference(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + branch and its RMSNorm: x, branch [..., D] of one dtype, weight [D]."""
    if _kernel_serves(x, branch, weight):
        return _add_norm_rows(x, branch, weight, None, eps, centre=False)
    if not use_compiled(x, branch, weight):
        h = x + branch
        return h, rms_norm(h, weight, eps)
    x, branch, weight, width = x.contiguous(), branch.contiguous(), weight.float(), x.shape[-1]
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_rms_rows[x.dtype](
        x.data_ptr(), branch.data_ptr(), weight.data_ptr(), total.data_ptr(), out.data_ptr(),
        x.numel() // width, width, eps,
    )  # fmt: skip
    return total, out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return the LayerNorm of x [..., D]; weight and bias are [D]."""
    if _kernel_serves(x, weight, bias):
        return _norm_rows(x, weight, bias, eps, centre=True)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + branch and its LayerNorm: x, branch [..., D] of one dtype; weight and bias are [D]."""
    if _kernel_serves(x, branch, weight, bias):
        return _add_norm_rows(x, branch, weight, bias, eps, centre=True)
    h = x + branch
    return h, layer_norm(h, weight, bias, eps)


def swiglu_reference(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@jit
def _swiglu_block(x, out, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(x + 2 * row * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * width + columns, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=mask)


@compiled("T* T* int int")
def _swiglu_rows(x, out, num_rows, width):
    for row in range(num_rows):
        gate, up = 2 * row * width, (2 * row + 1) * width
        for i in range(width):
            value = load(x, gate + i)
            store(out, row * width + i, value / (np.float32(1) + exp(-value)) * load(x, up + i))


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up of x, which holds [gate; up] (Shazeer, 2020): x [..., 2 F] -> [..., F]."""
    on_gpu = _kernel_serves(x)
    if not on_gpu and not use_compiled(x):
        return swiglu_reference(x)
    x, width = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    num_rows = out.numel() // max(width, 1)
    if on_gpu:
        _swiglu_block[(num_rows, triton.cdiv(width, SWIGLU_WIDTH))](
            x, out, width, BLOCK=SWIGLU_WIDTH, **launch_config("row", width, x.dtype).options
        )
    else:
        _swiglu_rows[x.dtype](x.data_ptr(), out.data_ptr(), num_rows, width)
    return out


def add_linear_reference(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return h + F.linear(x, weight, bias)


def add_linear_(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return h + x W^T + b: h [T, N], x [T, K], weight [N, K], bias [N]; h may be overwritten, unless a gradient needs it.

    On a GPU, a product without a bias is added to h directly, without a temporary tensor.
    """
    if bias is None and _kernel_serves(h, x, weight):
        return h.addmm_(x, weight.T)
    return h + F.linear(x, weight, bias)


def gated_residual_reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + gate.float().tanh() * branch.float()).to(x.dtype)


@jit
def _add_gated(x, branch, factor, out, D, SCALAR: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    at = tl.program_id(0).to(tl.int64) * D + columns
    t = tl.load(factor) if SCALAR else tl.load(factor + columns, mask=mask, other=0.0)
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    y += t * tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@jit_runtime("num_rows")
def _gated_gradients(
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
        _add_gated[(num_rows, triton.cdiv(width, WIDTH))](
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
        _gated_gradients[(len(sums), triton.cdiv(width, WIDTH))](
            grad_out, branch, factor, grad_branch, sums, num_rows, width, SCALAR=factor.numel() == 1, BLOCK=WIDTH,
            ROWS=ROWS, **launch_config("row", width, branch.dtype).options,
        )  # fmt: skip
        grad_factor = sums.sum(0) if factor.numel() > 1 else sums.sum().view(1)
        return grad_out, grad_branch, grad_factor


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + tanh(gate) * branch (Flamingo, figure 4): x [T, D], branch [T, D], gate [1] or [D] -> [T, D].

    It is for training, and for models whose gates are not folded into the branch's last weight.
    """
    if not use_triton(x):
        return gated_residual_reference(x, branch, gate)
    return _GatedResidual.apply(x.contiguous(), branch.contiguous(), gate.float().tanh())


def greedy_argmax_reference(logits: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    # a row's maximum is NaN where any of its logits is
    is_finite = logits.amax(-1).isfinite()
    return logits.index_fill(1, excluded, -torch.inf).argmax(-1), is_finite


@inlined
def largest(logits, first, width):
    top = np.int32(-(2**31))
    for i in range(first, first + width):
        top = max(top, ordered_bits(load(logits, i)))
    return top


@inlined
def index_of(top, logits, first, width):
    index = np.int32(width)
    least = np.int32(-1) if top == 0 else top  # zero and minus zero, whose ordered bits are -1, are equal
    for i in range(width):
        candidate = np.int32(i) if ordered_bits(load(logits, first + i)) >= least else np.int32(width)
        index = min(index, candidate)
    return index


@compiled("T* int64* int64* int64* int int int int")
def _greedy_rows(logits, excluded, token_ids, is_finite, num_rows, stride, width, num_excluded):
    infinite = np.int32(0x7F800000)
    lowest = np.int32(infinite ^ np.int32(-1))  # minus infinity as ordered bits
    for row in range(num_rows):
        first = row * stride
        size = np.int32(0)  # the largest magnitude; that of a NaN is larger than infinity's
        for i in range(first, first + width):
            size = max(size, np.int32(np.float32(load(logits, i)).view(np.int32) & np.int32(0x7FFFFFFF)))
        top = largest(logits, first, width)
        is_finite[row] = size <= infinite and lowest < top < infinite
        for i in range(num_excluded):
            store(logits, first + excluded[i], np.float32(-np.inf))
        token_ids[row] = index_of(largest(logits, first, width), logits, first, width)


def greedy_argmax(logits: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token ids [S] and whether each row is finite.

    logits [S, V] are overwritten; excluded [E] int64 are ids that are never chosen. The compiled loop reads the logits in
    their own dtype, while torch's operators copy them to float32 and read them twice.
    """
    if not use_compiled(logits[:1]) or logits.stride(1) != 1:
        return greedy_argmax_reference(logits, excluded)
    num_rows, width = logits.shape
    token_ids, is_finite = torch.empty(2, num_rows, dtype=torch.int64)
    _greedy_rows[logits.dtype](
        logits.data_ptr(), excluded.data_ptr(), token_ids.data_ptr(), is_finite.data_ptr(), num_rows, logits.stride(0),
        width, len(excluded),
    )  # fmt: skip
    return token_ids, is_finite.bool()
