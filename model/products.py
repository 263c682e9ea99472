"""Products with the weights of a matrix on a CPU, one class per format.

`float32` and `onednn` are the same numbers, as stored and in oneDNN's layout; `bfloat16` always has oneDNN's layout, with
float32 weights on a processor without bfloat16 arithmetic. `int4` stores groups of 32 weights as (q - 8) * scale + zero: a
matrix quantised in such groups (Q4_1) keeps its values, except that the two constants are rounded to bfloat16. `int8` has
one scale per row. Both need bfloat16 activations, as `bfloat16` does. `rounded` is a product in bfloat16 with float32
inputs and outputs, for an encoder whose other numbers stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has_bfloat16, runs_numba
from kernels.integer_product import instructions_for, integer_product, pack
from kernels.integer_tile import Instructions
from kernels.weight_only import GROUP, quantise_groups

Format = Literal["int4", "int8", "bfloat16", "float32", "onednn", "rounded"]
FLOAT32: tuple[Format, ...] = ("float32", "onednn")
ROUNDED: tuple[Format, ...] = ("rounded",)
# the packed kernels take a multiple of this number of rows
ROW_MULTIPLE = 16
# numbers of rows above this one are padded to the multiple for oneDNN
PADDED_FROM = 32
# rounding does not make a matrix with fewer elements faster
MIN_ROUNDED = 1 << 16


class Product(Protocol):
    """A matrix product [M, K] -> [M, N]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Int4:
    """Weights in groups of four bits, for a processor without instructions for integer products."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        q, self.constants = quantise_groups(weight)
        self.packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
        self.bias = None if bias is None else bias.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.constants)
        return y if self.bias is None else y + self.bias


class Int8:
    """Weights in 8 bits, for a processor without instructions for integer products."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # the scale is rounded first, and the weights are quantised by the rounded scale
        largest = torch.maximum(weight.amax(-1), -weight.amin(-1)).float()
        scale = (largest * (1 + 2**-8) / 127).clamp(min=1e-12).to(torch.bfloat16)
        self.scale = scale
        self.q = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.bias = None if bias is None else bias.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x, self.q, self.scale)
        return y if self.bias is None else y + self.bias


class IntegerProduct:
    """Weights in 4 or 8 bits, which are multiplied as integers."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int, instructions: Instructions) -> None:
        self.weights = pack(weight, bits, instructions)
        self.bias = None if bias is None else bias.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        y = integer_product(x, self.weights)
        return y if self.bias is None else y + self.bias


def _instructions(bits: int) -> Instructions | None:
    return instructions_for(bits) if runs_numba() else None


def instruction_names() -> list[str | None]:
    """Return the names of the instructions for weights of 4 and of 8 bits, None where torch multiplies."""
    return [known.name if known else None for known in (_instructions(4), _instructions(8))]


def packed(weight: Tensor, bias: Tensor | None, bits: int) -> Product:
    """Return a product of weights in 4 or 8 bits, as integers if the processor has instructions for it."""
    if (instructions := _instructions(bits)) is not None:
        return IntegerProduct(weight, bias, bits, instructions)
    return Int4(weight, bias) if bits == 4 else Int8(weight, bias)


class Plain:
    """Weights as a float32 matrix."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.float()
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OneDNN:
    """Weights of `dtype` in oneDNN's fastest layout, which is computed here once and not in each call.

    oneDNN compiles a kernel for each number of rows, which takes several times longer than a product. So larger numbers of
    rows are padded to a multiple.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)
        self.bias = None if bias is None else bias.to(dtype)

    @property
    def weight(self) -> Tensor:
        return self.packed.to_dense()

    def __call__(self, x: Tensor) -> Tensor:
        count = len(x)
        if count > PADDED_FROM and (padding := -count % ROW_MULTIPLE):
            return self(F.pad(x, (0, 0, 0, padding)))[:count]
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Widened:
    """A product in float32 of bfloat16 inputs, whose output is rounded to bfloat16; the weights are not rounded."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.product = (OneDNN if torch.backends.mkldnn.is_available() else Plain)(weight, bias)
        self.bias = self.product.bias

    @property
    def weight(self) -> Tensor:
        return self.product.weight

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.float()).to(torch.bfloat16)


def bfloat16(weight: Tensor, bias: Tensor | None) -> Product:
    """Return a product of bfloat16 inputs and outputs.

    Where the processor has no bfloat16 arithmetic, torch's product of many rows takes several times as long as in float32.
    """
    return OneDNN(weight, bias, torch.bfloat16) if has_bfloat16() else Widened(weight, bias)


class Rounded:
    """A product in bfloat16 that accumulates in float32; its input and output are float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.product = bfloat16(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.to(torch.bfloat16)).float()


FORMATS: dict[Format, Callable[[Tensor, Tensor | None], Product]] = {
    "int4": partial(packed, bits=4),
    "int8": partial(packed, bits=8),
    "bfloat16": bfloat16,
    "float32": Plain,
    "onednn": OneDNN,
    "rounded": Rounded,
}


def formats_for(weight: Tensor, requested: Sequence[Format]) -> tuple[Format, ...]:
    """Return the requested formats whose kernel supports a matrix of this shape here; bfloat16 and float32 support all."""
    rows, columns = weight.shape
    fits = {
        "int4": rows % ROW_MULTIPLE == 0 and columns % GROUP == 0,
        "int8": rows % ROW_MULTIPLE == 0 and columns % GROUP == 0,
        "onednn": torch.backends.mkldnn.is_available(),
        "rounded": rows * columns >= MIN_ROUNDED,
    }
    fallback: Format = "float32" if set(requested) <= {*FLOAT32, *ROUNDED} else "bfloat16"
    return tuple(name for name in requested if fits.get(name, True)) or (fallback,)
