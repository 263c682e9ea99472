"""RMSNorm and LayerNorm over the last axis, with statistics in float32. Gradients come from torch, not from the kernels."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import jit, tl, triton, use_compiled, use_triton
from kernels.compiled import compiled, inlined, load, store
from kernels.configs import launch_config


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


@jit
def _norm_row(x, weight, bias, out, stride, eps, D: tl.constexpr, BLOCK: tl.constexpr, CENTRE: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = columns < D
    y = tl.load(x + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    if CENTRE:
        y = tl.where(mask, y - tl.sum(y, 0) / D, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps) * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * D + columns, y.to(out.dtype.element_ty), mask=mask)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centre: bool) -> Tensor:
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty(rows.shape)
    _norm_row[(len(rows),)](
        rows, weight, bias, out, rows.stride(0), eps, D=width, BLOCK=triton.next_power_of_2(width), CENTRE=centre,
        **launch_config("row", width, x.dtype).options,
    )  # fmt: skip
    return out.view(x.shape)


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


def _rms_norm_compiled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight, width = x.contiguous(), weight.float(), x.shape[-1]
    out = torch.empty_like(x)
    _rms_rows[x.dtype](x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
    return out


def _add_rms_norm_compiled(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, branch, weight, width = x.contiguous(), branch.contiguous(), weight.float(), x.shape[-1]
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_rms_rows[x.dtype](
        x.data_ptr(), branch.data_ptr(), weight.data_ptr(), total.data_ptr(), out.data_ptr(),
        x.numel() // width, width, eps,
    )  # fmt: skip
    return total, out


def _kernel_serves(x: Tensor, weight: Tensor) -> bool:
    return use_triton(x) and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm of x [..., D]; weight [D] is of x's dtype or float32."""
    if _kernel_serves(x, weight):
        return _launch(x, weight, None, eps, centre=False)
    if use_compiled(x, weight):
        return _rms_norm_compiled(x, weight, eps)
    if weight.dtype != x.dtype:
        return rms_norm_reference(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + branch and its norm: x, branch [..., D] of one dtype, weight [D]."""
    if not use_triton(x) and use_compiled(x, branch, weight):
        return _add_rms_norm_compiled(x, branch, weight, eps)
    h = x + branch
    return h, rms_norm(h, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return the LayerNorm of x [..., D]; weight and bias are [D]."""
    if _kernel_serves(x, weight):
        return _launch(x, weight, bias, eps, centre=True)
    return F.layer_norm(x, weight.shape, weight, bias, eps)
