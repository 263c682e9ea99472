"""The inner loop of `integer_product`, written in LLVM instructions: one tile of output features for a few rows.

A tile has as many features as a register has lanes of 32 bits. A lane holds four neighbouring columns of its feature, so
that one instruction multiplies four bytes of a row by these columns of all features of the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels.compiled import cpu_target, intrinsic, numba, types

if numba is not None:
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.core import cgutils

GROUP = 32  # columns that have a scale in common
COLUMNS = 4  # of a lane
DOTS = GROUP // COLUMNS
# A group of a row: the upper bytes of its integers, then from these bytes on their lower bytes, its scale, the scale times
# the sum of the integers, and the integer at which the sum of its products starts
LOW_AT, SCALE_AT, SUM_AT, START_AT, GROUP_BYTES = 32, 64, 68, 72, 80
# the largest integer of a row: both of its bytes, the upper one rounded, are -128..127
LARGEST = 127 * 256 + 127


@dataclass(frozen=True, slots=True)
class Instructions:
    """Instructions of x86 that multiply bytes 0..255 by bytes -128..127."""

    name: str
    lanes: int
    needs: tuple[str, ...]  # features of a processor, as LLVM names them
    bits: tuple[int, ...] = (4, 8)


# The fastest first. AVX2 adds products in 16 bits, where those of weights in 8 bits could overflow
KNOWN = (
    Instructions("avx512vnni", 16, ("avx512vnni", "avx512bw")),
    Instructions("avxvnni", 8, ("avxvnni", "avx2", "fma")),
    Instructions("avx2", 8, ("avx2", "fma"), bits=(4,)),
)


def supported() -> list[Instructions]:
    """Return the known instructions that this processor has, the fastest first."""
    if numba is None:
        return []
    *_, features = cpu_target.target_context.codegen().magic_tuple()
    return [known for known in KNOWN if {f"+{name}" for name in known.needs} <= set(features.split(","))]


def bytes_per_feature(bits: int) -> int:
    """Return the bytes of a group of one feature; in four bits, its scale and zero follow its columns."""
    return GROUP if bits == 8 else GROUP // 2 + 4


def multiply_tile(instructions: Instructions, bits: int, num_rows: int) -> Any:
    """Return a function for compiled loops: (weights, rows, scales, out, number of groups, bytes of an output row).

    The first four are addresses: of the packed weights of a tile, of the quantised groups of `num_rows` rows, of the scales
    of its features (8 bits, float32), and of its first feature in the bfloat16 output of the first row.
    """

    @intrinsic
    def multiply(context, weights, rows, scales, out, num_groups, out_stride):
        def generate(context, builder, signature, arguments):
            _Tile(builder, instructions, bits).multiply(num_rows, *arguments)
            return context.get_dummy_value()

        return types.void(weights, rows, scales, out, num_groups, out_stride), generate

    return multiply


class _Tile:
    """Appends instructions to a builder."""

    def __init__(self, builder: Any, instructions: Instructions, bits: int) -> None:
        self.builder, self.bits, self.name, self.lanes = builder, bits, instructions.name, instructions.lanes
        self.byte, self.short, self.int, self.long = (ir.IntType(size) for size in (8, 16, 32, 64))
        self.ints = ir.VectorType(self.int, self.lanes)
        self.floats = ir.VectorType(ir.FloatType(), self.lanes)

    def multiply(
        self, num_rows: int, weights: Any, rows: Any, scales: Any, out: Any, num_groups: Any, stride: Any
    ) -> None:
        builder = self.builder
        zero = ir.Constant(self.floats, [0.0] * self.lanes)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(num_rows)]
        row_bytes = builder.mul(num_groups, self.long(GROUP_BYTES))
        with cgutils.for_range(builder, num_groups) as loop:
            at = self.offset(weights, builder.mul(loop.index, self.long(self.lanes * bytes_per_feature(self.bits))))
            columns, constants = self.unpack(at)
            for row, total in enumerate(totals):
                group = self.offset(
                    rows, builder.mul(row_bytes, self.long(row)), builder.mul(loop.index, self.long(GROUP_BYTES))
                )
                builder.store(self.add_group(builder.load(total), columns, constants, group), total)
        for row, total in enumerate(totals):
            sums = builder.load(total)
            if self.bits == 8:
                sums = builder.fmul(sums, self.load(scales, self.floats))
            self.store(sums, self.offset(out, builder.mul(stride, self.long(row))))

    def unpack(self, at: Any) -> tuple[list[Any], Any]:
        """Return the columns of a group, and for weights in four bits the features' scales and zeros."""
        builder, size = self.builder, self.lanes * COLUMNS
        if self.bits == 8:
            return [self.load(self.offset(at, self.long(size * i)), self.ints) for i in range(DOTS)], None
        low_bits, columns = self.splat(self.int(0x0F0F0F0F)), []
        for i in range(DOTS // 2):
            pair = self.load(self.offset(at, self.long(size * i)), self.ints)
            columns += [builder.and_(half, low_bits) for half in (pair, builder.lshr(pair, self.splat(self.int(4))))]
        pairs = self.load(self.offset(at, self.long(size * DOTS // 2)), self.ints)
        scale = builder.shl(pairs, self.splat(self.int(16)))
        zero = builder.and_(pairs, self.splat(self.int(-(1 << 16))))
        return columns, [builder.bitcast(constant, self.floats) for constant in (scale, zero)]

    def add_group(self, total: Any, columns: list[Any], constants: Any, group: Any) -> Any:
        """Return the features' totals of a row with the products of one group added."""
        builder = self.builder
        start = self.splat(self.load(self.offset(group, self.long(START_AT)), self.int))
        upper = self.dot(self.splat(self.int(0)), columns, group)
        lower = self.dot(start, columns, self.offset(group, self.long(LOW_AT)))
        products = builder.sitofp(builder.add(builder.shl(upper, self.splat(self.int(8))), lower), self.floats)
        factor = self.splat(self.load(self.offset(group, self.long(SCALE_AT)), ir.FloatType()))
        if self.bits == 4:
            scale, zero = constants
            row_sum = self.splat(self.load(self.offset(group, self.long(SUM_AT)), ir.FloatType()))
            total = self.call("llvm.fma", self.floats, zero, row_sum, total)
            factor = builder.fmul(scale, factor)
        return self.call("llvm.fma", self.floats, factor, products, total)

    def dot(self, start: Any, columns: list[Any], row: Any) -> Any:
        """Return the sums of the products of a group's columns with the bytes at an address, added to `start`."""
        builder, bits = self.builder, 32 * self.lanes
        bytes_of_row = [self.splat(self.load(self.offset(row, self.long(COLUMNS * i)), self.int)) for i in range(DOTS)]
        if self.name != "avx2":
            for pair in zip(columns, bytes_of_row, strict=True):
                start = self.call(f"llvm.x86.avx512.vpdpbusd.{bits}", self.ints, start, *pair)
            return start
        as_bytes, as_shorts = ir.VectorType(self.byte, 4 * self.lanes), ir.VectorType(self.short, 2 * self.lanes)
        sums = ir.Constant(as_shorts, [0] * 2 * self.lanes)
        for pair in zip(columns, bytes_of_row, strict=True):
            operands = [builder.bitcast(operand, as_bytes) for operand in pair]
            sums = builder.add(sums, self.call("llvm.x86.avx2.pmadd.ub.sw", as_shorts, *operands))
        ones = ir.Constant(as_shorts, [1] * 2 * self.lanes)
        return builder.add(start, self.call("llvm.x86.avx2.pmadd.wd", self.ints, sums, ones))

    def store(self, sums: Any, address: Any) -> None:
        """Store float32 sums as bfloat16, rounded to nearest even; a NaN stays a NaN."""
        builder, halves = self.builder, ir.VectorType(self.short, self.lanes)
        bits = builder.bitcast(sums, self.ints)
        is_odd = builder.and_(builder.lshr(bits, self.splat(self.int(16))), self.splat(self.int(1)))
        rounded = builder.add(builder.add(bits, is_odd), self.splat(self.int(0x7FFF)))
        rounded = builder.lshr(rounded, self.splat(self.int(16)))
        is_nan = builder.fcmp_unordered("uno", sums, sums)
        shorts = builder.trunc(builder.select(is_nan, self.splat(self.int(0x7FC0)), rounded), halves)
        builder.store(shorts, builder.inttoptr(address, halves.as_pointer())).align = 2

    def load(self, address: Any, kind: Any) -> Any:
        loaded = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        loaded.align = 1
        return loaded

    def offset(self, address: Any, *offsets: Any) -> Any:
        for offset in offsets:
            address = self.builder.add(address, offset)
        return address

    def splat(self, value: Any) -> Any:
        """Return a vector whose lanes all are `value`."""
        kind = ir.VectorType(value.type, self.lanes)
        if isinstance(value, ir.Constant):
            return ir.Constant(kind, [value.constant] * self.lanes)
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, self.int(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(self.ints, [0] * self.lanes))

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        name = f"{name}.v{self.lanes}f32" if name == "llvm.fma" else name
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)
