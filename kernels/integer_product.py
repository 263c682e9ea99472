"""Products of a few bfloat16 rows with packed weights on a CPU, in integer arithmetic, on all of torch's threads.

Each group of 32 numbers of a row becomes integers of 16 bits with a scale of its own. The products of their two bytes with
the weights are summed as integers within a group, and over the groups in float32. A row's result does not depend on the
other rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.compiled import bfloat16s, float32s, inlined, int32s, load, uint8s
from kernels.integer_tile import (
    DOTS,
    GROUP,
    GROUP_BYTES,
    KNOWN,
    LARGEST,
    LOW_AT,
    SCALE_AT,
    START_AT,
    SUM_AT,
    Instructions,
    multiply_tile,
    supported,
)
from kernels.threads import has_threads, indices, run_on_threads, share, thread_functions, threaded, wait_until
from kernels.weight_only import quantise_groups, quantise_int8

# groups whose numbers all are less, 2^-100 as bits of a bfloat16, become zero: the inverse of their scale could be infinite
SMALLEST = 0x0D80
# u - OFFSETS[bits] is the signed integer of the packed u
OFFSETS = {4: 8, 8: 128}
# what a kernel reads of a matrix: two addresses, the numbers of its tiles and groups, and the bytes of a group of a tile
LAYOUT = "packed scales num_tiles num_groups group_bytes"
ENTRY = indices(LAYOUT)
# the arguments of the kernel: a counter of `wait_until`, the layout of the matrix, addresses of tensors, the number of rows
AT = indices(f"counter {LAYOUT} x groups out num_rows")
Arguments = ctypes.c_int64 * len(AT)


@dataclass(frozen=True, slots=True)
class IntegerWeights:
    """A matrix [N, K] in tiles of as many features as the instructions have lanes."""

    packed: Tensor  # uint8 [N / lanes, K / 32, lanes * bytes of a feature]
    scales: Tensor | None  # of 8 bits: float32 [N]
    instructions: Instructions
    bits: int

    # looked up once: the kernel, the `LAYOUT`, and the size of the output and of the quantised input
    kernel: int = field(init=False, repr=False)
    layout: tuple[int, ...] = field(init=False, repr=False)
    num_features: int = field(init=False, repr=False)
    row_bytes: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scales = 0 if self.scales is None else self.scales.data_ptr()
        object.__setattr__(self, "kernel", _multiply[self.bits, KNOWN.index(self.instructions)])
        object.__setattr__(self, "layout", (self.packed.data_ptr(), scales, *self.packed.shape))
        object.__setattr__(self, "num_features", len(self.packed) * self.instructions.lanes)
        object.__setattr__(self, "row_bytes", self.packed.shape[1] * GROUP_BYTES)


@cache
def instructions_for(bits: int) -> Instructions | None:
    """Return the fastest instructions of this processor for weights of 4 or 8 bits; None: torch computes the products.

    Without an OpenMP runtime, whose threads torch and these kernels share, there are none either.
    """
    if not has_threads():
        return None
    return next((known for known in supported() if bits in known.bits), None)


def pack(weight: Tensor, bits: int, instructions: Instructions) -> IntegerWeights:
    """Quantise and pack a matrix [N, K]. N is a multiple of the lanes, K of 32."""
    lanes = instructions.lanes
    if bits == 8:
        q, scales = quantise_int8(weight)
        unsigned = q.view(torch.uint8) ^ OFFSETS[8]  # q + 128
    else:
        q, constants = quantise_groups(weight)
        unsigned = q.to(torch.uint8)
    # [N / lanes, K / 32, dots of a group, lanes]: the columns of a lane, as one number
    columns = (
        unsigned.view(torch.int32).view(-1, lanes, weight.shape[1] // GROUP, DOTS).permute(0, 2, 3, 1).contiguous()
    )
    if bits == 8:
        return IntegerWeights(columns.view(torch.uint8).flatten(2), scales, instructions, bits)
    halves = (columns[:, :, 0::2] | columns[:, :, 1::2] << 4).view(torch.uint8)
    of_tiles = constants.view(torch.uint8).unflatten(1, (-1, lanes)).transpose(0, 1)
    return IntegerWeights(torch.cat([halves.flatten(2), of_tiles.flatten(2)], dim=2), None, instructions, bits)


def unpack(weights: IntegerWeights) -> Tensor:
    """Return the matrix [N, K] in float32."""
    lanes, columns = weights.instructions.lanes, weights.packed
    num_tiles, num_groups, _ = columns.shape
    if weights.bits == 4:
        halves, constants = columns.split([lanes * GROUP // 2, 4 * lanes], dim=2)
        halves = halves.unflatten(2, (DOTS // 2, 1, -1))
        columns = torch.cat([halves & 15, halves >> 4], dim=3)
    signed = columns.reshape(num_tiles, num_groups, DOTS, lanes, -1).float() - OFFSETS[weights.bits]
    groups = signed.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)  # [N, K / 32, 32]
    if weights.scales is not None:
        return groups.flatten(1) * weights.scales[:, None]
    of_tiles = constants.contiguous().view(torch.bfloat16).float().unflatten(2, (lanes, 2))
    scale, zero = of_tiles.transpose(1, 2).flatten(0, 1).split(1, dim=2)  # [N, K / 32, 1]
    return (groups * scale + zero).flatten(1)


def round_rows(x: Tensor) -> Tensor:
    """Return x [M, K] in float32 with each group of 32 numbers rounded to 16 bits."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < 2.0**-100, 0, LARGEST / largest)  # a NaN is not less
    return ((groups * inverse).round_() * (largest / LARGEST)).flatten(-2)


def integer_product_reference(x: Tensor, weights: IntegerWeights) -> Tensor:
    return (round_rows(x) @ unpack(weights).T).to(torch.bfloat16)


def integer_product(x: Tensor, weights: IntegerWeights) -> Tensor:
    """Multiply x [M, K] bfloat16 by weights of `pack`: -> [M, N] bfloat16."""
    x, num_rows = x.contiguous(), len(x)
    out = x.new_empty(num_rows, weights.num_features)
    groups = torch.empty(num_rows * weights.row_bytes, dtype=torch.uint8)
    run_on_threads(
        weights.kernel, Arguments(0, *weights.layout, x.data_ptr(), groups.data_ptr(), out.data_ptr(), num_rows)
    )
    return out


@inlined
def quantise_group(x, first, to, offset):
    """Quantise the 32 numbers of x from `first` on, and write them to the address `to` as `multiply_tile` reads them."""
    largest = np.uint16(0)
    for i in range(first, first + GROUP):  # as integers, of which that of a NaN is the largest
        largest = max(largest, x[i] & np.uint16(0x7FFF))
    top = np.uint32(np.uint32(largest) << np.uint32(16)).view(np.float32)
    inverse = np.float32(LARGEST) / top if largest >= SMALLEST else np.float32(0)
    total, upper_bytes, lower_bytes = np.int32(0), uint8s(to), uint8s(to + LOW_AT)
    for i in range(GROUP):
        integer = np.int32(np.rint(load(x, first + i) * inverse))
        upper_bytes[i] = np.uint8((integer + np.int32(128)) >> np.int32(8))
        lower_bytes[i] = np.uint8(integer)
        total += integer
    scale = top / np.float32(LARGEST)
    float32s(to + SCALE_AT)[0] = scale
    float32s(to + SUM_AT)[0] = scale * np.float32(total)
    int32s(to + START_AT)[0] = -offset * total


@inlined
def quantise(x, groups, first, end, offset):
    """Quantise the groups of x from `first` to `end`; the first group of all is written to the address `groups`."""
    for group in range(first, end):
        quantise_group(x, group * GROUP, groups + group * GROUP_BYTES, offset)


def multiply_share(known: Instructions, bits: int) -> Any:
    """Return a function of compiled loops that multiplies quantised rows by a share of the tiles of a matrix.

    The layout of the matrix begins at index `matrix` of `layout`.
    """
    lanes = known.lanes
    multiply_1, multiply_2, multiply_4, multiply_8 = (multiply_tile(known, bits, rows) for rows in (1, 2, 4, 8))

    @inlined
    def multiply(layout, matrix, groups, out, num_rows, thread, num_threads):
        packed, scales, num_tiles = layout[matrix], layout[matrix + ENTRY.scales], layout[matrix + ENTRY.num_tiles]
        num_groups, group_bytes = layout[matrix + ENTRY.num_groups], layout[matrix + ENTRY.group_bytes]
        row_groups, row_out = num_groups * GROUP_BYTES, num_tiles * lanes * 2
        first_tile, end_tile = share(num_tiles, thread, num_threads)
        for tile in range(first_tile, end_tile):
            weights, features = packed + tile * num_groups * group_bytes, scales + tile * lanes * 4
            rows, to, left = groups, out + tile * lanes * 2, num_rows
            while left >= 8:
                multiply_8(weights, rows, features, to, num_groups, row_out)
                rows, to, left = rows + 8 * row_groups, to + 8 * row_out, left - 8
            if left >= 4:
                multiply_4(weights, rows, features, to, num_groups, row_out)
                rows, to, left = rows + 4 * row_groups, to + 4 * row_out, left - 4
            if left >= 2:
                multiply_2(weights, rows, features, to, num_groups, row_out)
                rows, to, left = rows + 2 * row_groups, to + 2 * row_out, left - 2
            if left == 1:
                multiply_1(weights, rows, features, to, num_groups, row_out)

    return multiply


@threaded
def _multiply(bits, instructions):
    multiply, offset = multiply_share(KNOWN[instructions], bits), OFFSETS[bits]
    thread_number, count_threads = thread_functions()

    def multiply_rows(arguments):
        thread, num_threads = np.int64(thread_number()), np.int64(count_threads())
        groups, num_rows = arguments[AT.groups], arguments[AT.num_rows]
        first, end = share(num_rows * arguments[AT.num_groups], thread, num_threads)
        quantise(bfloat16s(arguments[AT.x]), groups, first, end, offset)
        wait_until(arguments, num_threads)
        multiply(arguments, AT.packed, groups, arguments[AT.out], num_rows, thread, num_threads)

    return multiply_rows
