"""Products in fp8 (e4m3): weights have a scale per output feature, activations one per token.

The scale of a token depends only on its own numbers, so a row does not depend on its batch. The product is torch's on GPUs
that support fp8; everywhere else the reference computes it from the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import jit, launch_config, tl, triton, use_triton

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
TINY = 1e-12  # a row of zeros has this as its largest number


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    # the largest number of a row becomes LARGEST up to rounding, and no number of the row exceeds LARGEST in fp8
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=TINY) / LARGEST
    return (x.float() / scale).to(FP8), scale


@jit
def _quantise_row(
    x, out, scale, stride, D: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr
):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = columns < D
    y = tl.load(x + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    # a maximum may drop a NaN, but its quotient stays one
    factor = tl.div_rn(tl.maximum(tl.max(tl.abs(y), 0), TINY), LARGEST)
    tl.store(scale + row, factor)
    tl.store(out + row * D + columns, tl.div_rn(y, factor).to(out.dtype.element_ty), mask=mask)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [T, D] in fp8, each row divided by its scale [T, 1] float32. A row that is not finite has a NaN."""
    if not use_triton(x):
        return quantise_rows_reference(x)
    num_rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out, scale = torch.empty(num_rows, width, dtype=FP8, device=x.device), x.new_empty(num_rows, 1, dtype=torch.float32)
    _quantise_row[(num_rows,)](
        x, out, scale, x.stride(0), D=width, BLOCK=triton.next_power_of_2(width), LARGEST=LARGEST, TINY=TINY,
        **launch_config("row", width, x.dtype).options,
    )  # fmt: skip
    return out, scale


def fp8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows, row_scale = quantise_rows_reference(x)
    return (F.linear(rows.float(), weight.float()) * row_scale * scale).to(x.dtype)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply x [T, K] by weights in fp8 [N, K], with a scale [N] float32 per feature: -> [T, N].

    On a GPU x is bfloat16, and N and K are multiples of 16.
    """
    if not (x.is_cuda and use_triton(x)):
        return fp8_linear_reference(x, weight, scale)
    if not len(x):
        return x.new_empty(0, len(weight))
    rows, row_scale = quantise_rows(x)
    return torch._scaled_mm(
        rows, weight.t(), scale_a=row_scale, scale_b=scale.unsqueeze(0), out_dtype=x.dtype, use_fast_accum=True
    )
