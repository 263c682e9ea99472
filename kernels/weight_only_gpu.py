"""The Triton kernels of `weight_only.py`: the product of few rows, and the unpacking of a whole matrix.

A program computes a tile of rows and features over all columns. Columns are not split, so for one size of tile the order of
a row's sums does not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import Launch, jit, jit_runtime, launch_config, tl, triton

COLUMNS = 64  # per step of a program, for int4 the two groups of a block
FEATURES = 64  # per program


@jit
def _int8_tile(weight, scale, features, mask, columns, width, DTYPE: tl.constexpr):
    """Weights of some features, [columns, features]."""
    at = weight + features[None, :].to(tl.int64) * width + columns[:, None]
    return (tl.load(at, mask=mask[None, :], other=0).to(tl.float32) * scale[None, :]).to(DTYPE)


@jit
def _int4_group(q, constants, mask, DTYPE: tl.constexpr):
    """Weights of one group. A scale and a zero are read as one word of 32 bits: smaller loads cannot be asynchronous."""
    both = tl.load(constants, mask=mask, other=0)
    scale, zero = (both << 16).to(tl.float32, bitcast=True), ((both >> 16) << 16).to(tl.float32, bitcast=True)
    return ((q.to(tl.float32) - 8.0) * scale[None, :] + zero[None, :]).to(DTYPE)


@jit
def _int4_groups(packed, constants, block, features, mask, num_features, DTYPE: tl.constexpr):
    """Weights of the two groups of a block, [32, features] each."""
    at = packed + (features.to(tl.int64) + block * num_features)[None, :] * 32 + tl.arange(0, 32)[:, None]
    q = tl.load(at, mask=mask[None, :], other=0)
    first = constants + 2 * block * num_features + features
    low = _int4_group(q & 15, first, mask, DTYPE)
    return low, _int4_group(q >> 4, first + num_features, mask, DTYPE)


@jit_runtime("num_rows")
def _multiply_int8(
    x, weight, scale, out, num_rows, num_features, width, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row_mask, mask = (rows < num_rows)[:, None], features < num_features
    factors = tl.load(scale + features, mask=mask, other=0.0)
    columns = tl.arange(0, COLUMNS)
    x_rows = x + rows[:, None].to(tl.int64) * width
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    for first in range(0, width, COLUMNS):
        w = _int8_tile(weight, factors, features, mask, first + columns, width, x.dtype.element_ty)
        y = tl.load(x_rows + first + columns[None, :], mask=row_mask, other=0.0)
        total = tl.dot(y, w, total, input_precision="ieee")
    at = out + rows[:, None].to(tl.int64) * num_features + features[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_mask & mask[None, :])


@jit_runtime("num_rows")
def _multiply_int4(
    x, packed, constants, out, num_rows, num_features, num_blocks, ROWS: tl.constexpr, FEATURES: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row_mask, mask = (rows < num_rows)[:, None], features < num_features
    x_groups = x + rows[:, None].to(tl.int64) * num_blocks * 64 + tl.arange(0, 32)[None, :]
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    for block in range(0, num_blocks):
        low, high = _int4_groups(packed, constants, block, features, mask, num_features, x.dtype.element_ty)
        y = tl.load(x_groups + block * 64, mask=row_mask, other=0.0)
        total = tl.dot(y, low, total, input_precision="ieee")
        y = tl.load(x_groups + block * 64 + 32, mask=row_mask, other=0.0)
        total = tl.dot(y, high, total, input_precision="ieee")
    at = out + rows[:, None].to(tl.int64) * num_features + features[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_mask & mask[None, :])


@jit
def _unpack_int8(weight, scale, out, num_features, width, FEATURES: tl.constexpr, COLUMNS: tl.constexpr):
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    mask, columns = features < num_features, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factors = tl.load(scale + features, mask=mask, other=0.0)
    w = _int8_tile(weight, factors, features, mask, columns, width, out.dtype.element_ty)
    tl.store(out + features[None, :].to(tl.int64) * width + columns[:, None], w, mask=mask[None, :])


@jit
def _unpack_int4(packed, constants, out, num_features, num_blocks, FEATURES: tl.constexpr):
    features, block = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES), tl.program_id(1)
    mask = features < num_features
    low, high = _int4_groups(packed, constants, block, features, mask, num_features, out.dtype.element_ty)
    at = out + (features.to(tl.int64) * num_blocks + block)[None, :] * 64 + tl.arange(0, 32)[:, None]
    tl.store(at, low, mask=mask[None, :])
    tl.store(at + 32, high, mask=mask[None, :])


def _launch(operator: str, x: Tensor) -> Launch:
    """Return the launch of a product: one of two sizes of tile, both of which are compiled at startup."""
    few = launch_config(operator, x.shape[1], x.dtype)
    return few if len(x) <= few.block else launch_config(f"{operator}_many", x.shape[1], x.dtype)


def _grid(num_features: int, num_rows: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(num_features, FEATURES), triton.cdiv(num_rows, rows)


def multiply_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The kernel of `weight_only.int8_linear`."""
    x, launch, (num_features, width) = x.contiguous(), _launch("int8", x), weight.shape
    out = x.new_empty(len(x), num_features)
    _multiply_int8[_grid(num_features, len(x), launch.block)](
        x, weight, scale, out, len(x), num_features, width,
        ROWS=launch.block, FEATURES=FEATURES, COLUMNS=COLUMNS, **launch.options,
    )  # fmt: skip
    return out


def multiply_int4(x: Tensor, packed: Tensor, constants: Tensor) -> Tensor:
    """The kernel of `weight_only.int4_linear`."""
    x, launch, (num_blocks, num_features, _) = x.contiguous(), _launch("int4", x), packed.shape
    out = x.new_empty(len(x), num_features)
    _multiply_int4[_grid(num_features, len(x), launch.block)](
        x, packed, constants.view(torch.int32), out, len(x), num_features, num_blocks,
        ROWS=launch.block, FEATURES=FEATURES, **launch.options,
    )  # fmt: skip
    return out


def unpack_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix [N, K] of int8 weights in a dtype."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _unpack_int8[_grid(len(weight), weight.shape[1], COLUMNS)](
        weight, scale, out, *weight.shape,
        FEATURES=FEATURES, COLUMNS=COLUMNS, **launch_config("row", COLUMNS, dtype).options,
    )  # fmt: skip
    return out


def unpack_int4(packed: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix [N, K] of int4 weights in a dtype."""
    num_blocks, num_features, _ = packed.shape
    out = torch.empty(num_features, num_blocks * COLUMNS, dtype=dtype, device=packed.device)
    _unpack_int4[triton.cdiv(num_features, FEATURES), num_blocks](
        packed, constants.view(torch.int32), out, num_features, num_blocks,
        FEATURES=FEATURES, **launch_config("row", COLUMNS, dtype).options,
    )  # fmt: skip
    return out
