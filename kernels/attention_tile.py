"""The inner loops of attention on a CPU, written in LLVM instructions: the query heads of one key head and a run of keys.

LLVM does not find these loops in scalar code: it needs the sums of all heads in registers while it goes through the keys.
The vectors are of 16 lanes or fewer. A processor with shorter registers uses several for each.
"""

from __future__ import annotations

from itertools import product
from math import gcd
from typing import Any

from kernels.compiled import cpu_target, intrinsic, numba, types

if numba is not None:
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.core import cgutils

LANES = 16
LINE_BYTES = 64  # of a processor's cache
prefetch: Any = None
# as in loops that Numba compiles: a product and a sum may become one instruction, and lanes are summed in any order
FASTMATH = ("contract", "reassoc")


def score_keys(head_dim: int, group: int) -> Any:
    """Return a function for compiled loops: (query, cache, first, count, weights, at, stride).

    It multiplies `group` query heads, the float32 array `query`, by `count` keys whose first element is `cache[first]`. The
    score of a head and a key is written to `weights[at + head * stride + key]`.
    """

    @intrinsic
    def score(context, query, cache, first, count, weights, at, stride):
        def generate(context, builder, signature, arguments):
            query, cache, first, count, weights, at, stride = arguments
            tile = _Tile(builder, head_dim, group, signature.args[1].dtype)
            query, weights = (_data(context, builder, signature, arguments, number) for number in (0, 4))
            tile.score(query, cache, first, count, weights, at, stride)
            return context.get_dummy_value()

        return types.void(query, cache, first, count, weights, at, stride), generate

    return score


def add_values(head_dim: int, group: int) -> Any:
    """Return a function for compiled loops: (out, cache, first, count, weights, at, stride).

    It adds `count` values whose first element is `cache[first]` to the `group` heads of the float32 array `out`, times the
    weights that `score_keys` describes.
    """

    @intrinsic
    def add(context, out, cache, first, count, weights, at, stride):
        def generate(context, builder, signature, arguments):
            out, cache, first, count, weights, at, stride = arguments
            tile = _Tile(builder, head_dim, group, signature.args[1].dtype)
            out, weights = (_data(context, builder, signature, arguments, number) for number in (0, 4))
            tile.add(out, cache, first, count, weights, at, stride)
            return context.get_dummy_value()

        return types.void(out, cache, first, count, weights, at, stride), generate

    return add


def _data(context: Any, builder: Any, signature: Any, arguments: Any, number: int) -> Any:
    return context.make_array(signature.args[number])(context, builder, arguments[number]).data


class _Tile:
    """Appends instructions to a builder. A head consists of vectors, its *parts*."""

    def __init__(self, builder: Any, head_dim: int, group: int, element: Any) -> None:
        self.builder, self.head_dim, self.group, self.element = builder, head_dim, group, element
        self.lanes = gcd(head_dim, LANES)
        self.parts = range(head_dim // self.lanes)
        self.int, self.long, self.float = ir.IntType(32), ir.IntType(64), ir.FloatType()
        self.ints, self.floats = ir.VectorType(self.int, self.lanes), ir.VectorType(self.float, self.lanes)

    def score(self, query: Any, cache: Any, first: Any, count: Any, weights: Any, at: Any, stride: Any) -> None:
        builder = self.builder
        heads = [
            [self.load(query, self.long(head * self.head_dim + part * self.lanes)) for part in self.parts]
            for head in range(self.group)
        ]
        with cgutils.for_range(builder, count, intp=self.long) as loop:
            begin = builder.add(first, builder.mul(loop.index, self.long(self.head_dim)))
            key = [self.load_element(cache, self.offset(begin, part)) for part in self.parts]
            to = builder.add(at, loop.index)
            for number, head in enumerate(heads):
                products = builder.fmul(head[0], key[0], FASTMATH)
                for pair in zip(head[1:], key[1:], strict=True):
                    products = self.multiply_add(*pair, products)
                score = self.total(products)
                place = builder.add(to, builder.mul(stride, self.long(number)))
                builder.store(score, builder.gep(weights, [place]))

    def add(self, out: Any, cache: Any, first: Any, count: Any, weights: Any, at: Any, stride: Any) -> None:
        most_heads = min(self.group, _num_sums())
        most_parts = max(_num_sums() // most_heads, 1)
        for head, part in product(range(0, self.group, most_heads), range(0, len(self.parts), most_parts)):
            heads = range(head, min(head + most_heads, self.group))
            parts = self.parts[part : part + most_parts]
            self.add_parts(heads, parts, out, cache, first, count, weights, at, stride)

    def add_parts(
        self,
        heads: range,
        parts: range,
        out: Any,
        cache: Any,
        first: Any,
        count: Any,
        weights: Any,
        at: Any,
        stride: Any,
    ) -> None:
        """Add some parts of the values to these parts of some heads, whose sums fit into registers."""
        builder = self.builder
        places = [(head, self.long(head * self.head_dim + part * self.lanes)) for head in heads for part in parts]
        sums = [cgutils.alloca_once_value(builder, self.load(out, place)) for _, place in places]
        with cgutils.for_range(builder, count, intp=self.long) as loop:
            begin = builder.add(first, builder.mul(loop.index, self.long(self.head_dim)))
            values = [self.load_element(cache, self.offset(begin, part)) for part in parts]
            at_key = builder.add(at, loop.index)
            weight = {
                head: self.splat(
                    builder.load(builder.gep(weights, [builder.add(at_key, builder.mul(stride, self.long(head)))]))
                )
                for head in heads
            }
            for number, (head, _) in enumerate(places):
                value = values[number % len(parts)]
                total = self.multiply_add(weight[head], value, builder.load(sums[number]))
                builder.store(total, sums[number])
        for total, (_, place) in zip(sums, places, strict=True):
            self.store(builder.load(total), out, place)

    def multiply_add(self, x: Any, y: Any, total: Any) -> Any:
        return self.builder.fadd(total, self.builder.fmul(x, y, FASTMATH), FASTMATH)

    def total(self, x: Any) -> Any:
        """Return the sum of the lanes."""
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        kind = ir.FunctionType(self.float, [self.float, self.floats])
        reduce = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(reduce, [self.float(-0.0), x], fastmath=FASTMATH)

    def offset(self, begin: Any, part: int) -> Any:
        return self.builder.add(begin, self.long(part * self.lanes))

    def load(self, pointer: Any, index: Any, kind: Any = None) -> Any:
        builder, kind = self.builder, self.floats if kind is None else kind
        loaded = builder.load(builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer()))
        loaded.align = kind.element.width // 8 if kind is not self.floats else 4
        return loaded

    def store(self, value: Any, pointer: Any, index: Any) -> None:
        builder = self.builder
        builder.store(value, builder.bitcast(builder.gep(pointer, [index]), self.floats.as_pointer())).align = 4

    def load_element(self, cache: Any, index: Any) -> Any:
        """Return elements of the cache as float32."""
        if self.element == types.float32:
            return self.load(cache, index)
        halves = self.load(cache, index, ir.VectorType(ir.IntType(16), self.lanes))
        bits = self.builder.shl(self.builder.zext(halves, self.ints), ir.Constant(self.ints, [16] * self.lanes))
        return self.builder.bitcast(bits, self.floats)

    def splat(self, value: Any) -> Any:
        undefined = ir.Constant(self.floats, ir.Undefined)
        first = self.builder.insert_element(undefined, value, self.int(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(self.ints, [0] * self.lanes))


def _num_sums() -> int:
    """Return how many vectors of sums fit into the registers, beside one of values and one of weights each."""
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
