"""The inner loops of attention on a CPU, written in LLVM instructions: the query heads of one key head and a run of keys.

LLVM does not derive these loops from scalar code: as many sums as fit stay in registers while the keys are read. Vectors
have 16 lanes or fewer, and a processor with shorter registers uses several for each.
"""

from __future__ import annotations

from itertools import product
from math import gcd
from typing import Any

from kernels.compiled import cpu_target, intrinsic, numba, types

if numba is not None:
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.core import cgutils

prefetch: Any = None

LANES = 16
LINE_BYTES = 64  # of a processor's cache
# as in loops that Numba compiles: a product and a sum may become one instruction, and lanes are summed in any order
FASTMATH = ("contract", "reassoc")


def score_keys(head_dim: int, group: int) -> Any:
    """Return a function for compiled loops: (query, cache, first, count, weights, at, stride).

    It multiplies `group` query heads, the float32 array `query`, by `count` keys whose first element is `cache[first]`. The
    score of a head and a key is written to the array element `weights[at + head * stride + key]`.
    """
    return _loop(head_dim, group, _Tile.score)


def add_values(head_dim: int, group: int) -> Any:
    """Return a function for compiled loops: (out, cache, first, count, weights, at, stride).

    It adds `count` values whose first element is `cache[first]`, times the weights that `score_keys` describes, to the
    `group` heads of the float32 array `out`.
    """
    return _loop(head_dim, group, _Tile.add)


def _loop(head_dim: int, group: int, append: Any) -> Any:
    @intrinsic
    def loop(context, heads, cache, first, count, weights, at, stride):
        def generate(context, builder, signature, arguments):
            heads, weights = (
                context.make_array(signature.args[number])(context, builder, arguments[number]).data
                for number in (0, 4)
            )
            _, cache, first, count, _, at, stride = arguments
            append(
                _Tile(builder, head_dim, group, signature.args[1].dtype, cache, first, count, weights, at, stride),
                heads,
            )
            return context.get_dummy_value()

        return types.void(heads, cache, first, count, weights, at, stride), generate

    return loop


class _Tile:
    """Appends instructions to a builder. A head consists of vectors, its *parts*."""

    def __init__(
        self, builder: Any, head_dim: int, group: int, element: Any,
        cache: Any, first: Any, count: Any, weights: Any, at: Any, stride: Any,
    ) -> None:  # fmt: skip
        self.builder, self.head_dim, self.group, self.element = builder, head_dim, group, element
        self.cache, self.first, self.count = cache, first, count
        self.weights, self.at, self.stride = weights, at, stride
        self.lanes = gcd(head_dim, LANES)
        self.num_parts = head_dim // self.lanes
        self.int, self.long, self.float = ir.IntType(32), ir.IntType(64), ir.FloatType()
        self.ints, self.floats = ir.VectorType(self.int, self.lanes), ir.VectorType(self.float, self.lanes)

    def score(self, query: Any) -> None:
        builder, parts = self.builder, range(self.num_parts)
        heads = [[self.load(query, self.offset(head, part)) for part in parts] for head in range(self.group)]
        with cgutils.for_range(builder, self.count, intp=self.long) as loop:
            key = [self.element_vector(loop.index, part) for part in parts]
            for number, head in enumerate(heads):
                products = builder.fmul(head[0], key[0], FASTMATH)
                for pair in zip(head[1:], key[1:], strict=True):
                    products = self.add_product(products, *pair)
                builder.store(self.sum_of_lanes(products), self.weight_at(number, loop.index))

    def add(self, out: Any) -> None:
        """Add the values in several loops, if the sums of all parts of all heads do not fit into registers."""
        most_heads = min(self.group, _num_sums())
        most_parts = max(_num_sums() // most_heads, 1)
        for head, part in product(range(0, self.group, most_heads), range(0, self.num_parts, most_parts)):
            heads = range(head, min(head + most_heads, self.group))
            parts = range(part, min(part + most_parts, self.num_parts))
            self.add_parts(out, heads, parts)

    def add_parts(self, out: Any, heads: range, parts: range) -> None:
        builder = self.builder
        sums = {
            (head, part): cgutils.alloca_once_value(builder, self.load(out, self.offset(head, part)))
            for head, part in product(heads, parts)
        }
        with cgutils.for_range(builder, self.count, intp=self.long) as loop:
            values = {part: self.element_vector(loop.index, part) for part in parts}
            weights = {head: self.splat(builder.load(self.weight_at(head, loop.index))) for head in heads}
            for (head, part), total in sums.items():
                builder.store(self.add_product(builder.load(total), weights[head], values[part]), total)
        for (head, part), total in sums.items():
            self.store(builder.load(total), out, self.offset(head, part))

    def add_product(self, total: Any, x: Any, y: Any) -> Any:
        return self.builder.fadd(total, self.builder.fmul(x, y, FASTMATH), FASTMATH)

    def sum_of_lanes(self, x: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        kind = ir.FunctionType(self.float, [self.float, self.floats])
        reduce = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(reduce, [self.float(-0.0), x], fastmath=FASTMATH)

    def offset(self, head: int, part: int) -> Any:
        return self.long(head * self.head_dim + part * self.lanes)

    def weight_at(self, head: int, key: Any) -> Any:
        builder = self.builder
        index = builder.add(builder.add(self.at, key), builder.mul(self.stride, self.long(head)))
        return builder.gep(self.weights, [index])

    def element_vector(self, key: Any, part: int) -> Any:
        """Return a part of a key or value in the cache as float32."""
        builder = self.builder
        index = builder.add(builder.add(self.first, builder.mul(key, self.long(self.head_dim))), self.offset(0, part))
        if self.element == types.float32:
            return self.load(self.cache, index)
        halves = ir.VectorType(ir.IntType(16), self.lanes)  # of bfloat16: the upper halves of float32
        loaded = builder.load(builder.bitcast(builder.gep(self.cache, [index]), halves.as_pointer()))
        loaded.align = 2
        bits = builder.shl(builder.zext(loaded, self.ints), ir.Constant(self.ints, [16] * self.lanes))
        return builder.bitcast(bits, self.floats)

    def load(self, pointer: Any, index: Any) -> Any:
        builder = self.builder
        loaded = builder.load(builder.bitcast(builder.gep(pointer, [index]), self.floats.as_pointer()))
        loaded.align = 4
        return loaded

    def store(self, value: Any, pointer: Any, index: Any) -> None:
        builder = self.builder
        builder.store(value, builder.bitcast(builder.gep(pointer, [index]), self.floats.as_pointer())).align = 4

    def splat(self, value: Any) -> Any:
        undefined = ir.Constant(self.floats, ir.Undefined)
        first = self.builder.insert_element(undefined, value, self.int(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(self.ints, [0] * self.lanes))


def _num_sums() -> int:
    """Return how many vectors of sums fit into the registers, in addition to those of values and weights."""
    *_, features = cpu_target.target_context.codegen().magic_tuple()
    return 24 if "+avx512f" in features.split(",") else 6


if numba is not None:

    @intrinsic
    def prefetch(context, cache, first, count):
        """Ask the processor to read `count` elements from `cache[first]` on, without waiting for them."""

        def generate(context, builder, signature, arguments):
            cache, first, count = arguments
            byte, int32, int64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
            kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), *[int32] * 3])
            fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            start = builder.bitcast(builder.gep(cache, [first]), byte.as_pointer())
            num_bytes = builder.mul(count, int64(signature.args[0].dtype.bitwidth // 8))
            with cgutils.for_range_slice(builder, int64(0), num_bytes, int64(LINE_BYTES), int64) as (at, _):
                # for reading, to keep in all levels of the cache, data
                builder.call(fetch, [builder.gep(start, [at]), int32(0), int32(3), int32(1)])
            return context.get_dummy_value()

        return types.void(cache, first, count), generate
