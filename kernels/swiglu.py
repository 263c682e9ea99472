"""SwiGLU (Shazeer, 2020): silu(gate) * up, of a product that holds [gate; up]."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_compiled
from kernels.compiled import compiled, exp, load, store


def swiglu_reference(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@compiled("T* T* int int")
def _swiglu_rows(x, out, num_rows, width):
    for row in range(num_rows):
        gate, up = 2 * row * width, (2 * row + 1) * width
        for i in range(width):
            value = load(x, gate + i)
            store(out, row * width + i, value / (np.float32(1) + exp(-value)) * load(x, up + i))


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up: x [..., 2 F] -> [..., F]."""
    if not use_compiled(x):
        return swiglu_reference(x)
    x, width = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    _swiglu_rows[x.dtype](x.data_ptr(), out.data_ptr(), out.numel() // max(width, 1), width)
    return out
