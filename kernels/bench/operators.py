"""Stage 2, continued: compares the operators between attentions, and products with packed weights, with references.

The references compute in float32, from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench.correctness import DTYPES, STAGE, compare, poison
from kernels.bench.measure import Result, Stopwatch
from kernels.bench.sizes import Sizes
from kernels.bench.task import Task
from kernels.fp8 import fp8_linear, fp8_linear_reference, quantise_rows, quantise_rows_reference
from kernels.rows import (
    add_layer_norm,
    add_layer_norm_reference,
    add_linear_,
    add_linear_reference,
    add_rms_norm,
    add_rms_norm_reference,
    gated_residual,
    gated_residual_reference,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)
from kernels.self_attention import (
    kv_store,
    kv_store_reference,
    rotary_angles,
    rotate_and_store,
    rotate_and_store_reference,
)
from kernels.weight_only import (
    MAX_ROWS,
    int4_linear,
    int8_linear,
    pack_int4,
    quantise_int8,
    unpack_int4_reference,
    unpack_int8_reference,
)

ROWS, WIDTH, EPS = 5, 2560, 1e-5  # a width that is not a power of 2
FFN_DIM = 11008  # not a multiple of the columns of one program
FEATURES = 144  # not a multiple of a tile
BLOCK_SIZE, SLOTS = 16, (5, -1, 40, 17, 16)  # of the cache; -1 is padding
# query heads, key heads, their size, and the elements that rotate
HEADS = ((8, 2, 128, 128), (4, 4, 80, 20))
# one tile of few rows, tiles of many, and a matrix that is unpacked as a whole
PRODUCT_ROWS = (16, 100, MAX_ROWS + 1)

Randn: TypeAlias = Callable[..., Tensor]  # random numbers of a shape, for one device and dtype
Pair: TypeAlias = tuple[Tensor, Tensor]  # the result of an operator, and the expected one


def _joined(results: Tensor | Sequence[Tensor]) -> Tensor:
    return results if isinstance(results, Tensor) else torch.cat([result.flatten() for result in results])


def _both(operator: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor], *rest: Any) -> Pair:
    expected = reference(*(x.float() for x in inputs), *rest)  # first: an operator may overwrite its inputs
    return _joined(operator(*inputs, *rest)), _joined(expected)


def rms_norms(randn: Randn) -> Pair:
    return _both(rms_norm, rms_norm_reference, [randn(ROWS, WIDTH), randn(WIDTH)], EPS)


def sums_and_rms_norms(randn: Randn) -> Pair:
    inputs = [randn(ROWS, WIDTH), randn(ROWS, WIDTH), randn(WIDTH)]
    return _both(add_rms_norm, add_rms_norm_reference, inputs, EPS)


def layer_norms(randn: Randn) -> Pair:
    return _both(layer_norm, layer_norm_reference, [randn(ROWS, WIDTH), randn(WIDTH), randn(WIDTH)], EPS)


def sums_and_layer_norms(randn: Randn) -> Pair:
    inputs = [randn(ROWS, WIDTH), randn(ROWS, WIDTH), randn(WIDTH), randn(WIDTH)]
    return _both(add_layer_norm, add_layer_norm_reference, inputs, EPS)


def swiglus(randn: Randn) -> Pair:
    return _both(swiglu, swiglu_reference, [randn(ROWS, 2 * FFN_DIM)])


def sums_of_products(randn: Randn) -> Pair:
    inputs = [randn(ROWS, FEATURES), randn(ROWS, WIDTH), randn(FEATURES, WIDTH)]
    return _both(add_linear_, add_linear_reference, inputs, None)


def gated_residuals(randn: Randn) -> Pair:
    inputs = [randn(ROWS, WIDTH), randn(ROWS, WIDTH), randn(WIDTH)]
    return _both(gated_residual, gated_residual_reference, inputs)


def rotations_and_stores(randn: Randn) -> Pair:
    """Compare queries, and a cache with the keys and values of all rows except one that is padding."""
    return _joined_pairs(_rotation_and_store(randn, *heads) for heads in HEADS)


def stores(randn: Randn) -> Pair:
    return _joined_pairs(_store(randn, num_kv_heads, head_dim) for _, num_kv_heads, head_dim, _ in HEADS)


def _joined_pairs(pairs: Iterator[Pair]) -> Pair:
    actual, expected = zip(*pairs, strict=True)
    return _joined(actual), _joined(expected)


def _rotation_and_store(randn: Randn, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int) -> Pair:
    heads, value = randn(ROWS, num_heads + num_kv_heads, head_dim), randn(ROWS, num_kv_heads, head_dim)
    positions, slots = torch.arange(ROWS, device=value.device) * 97, torch.tensor(SLOTS, device=value.device)
    angles = [angle.to(value.dtype) for angle in rotary_angles(positions, rotary_dim, 1e4)]

    def stored(run: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        cache = inputs[0].new_zeros(3, 2, num_kv_heads, BLOCK_SIZE, head_dim)
        return run(*inputs, cache, slots), cache

    return _both(
        partial(stored, rotate_and_store), partial(stored, rotate_and_store_reference), [heads, value, *angles]
    )


def _store(randn: Randn, num_kv_heads: int, head_dim: int) -> Pair:
    key, value = randn(2, ROWS, num_kv_heads, head_dim)
    slots = torch.tensor(SLOTS, device=key.device)

    def stored(run: Callable[..., None], *inputs: Tensor) -> Tensor:
        cache = inputs[0].new_zeros(3, 2, num_kv_heads, BLOCK_SIZE, head_dim)
        run(*inputs, cache, slots)
        return cache

    return _both(partial(stored, kv_store), partial(stored, kv_store_reference), [key, value])


def int8_products(randn: Randn, num_rows: int) -> Pair:
    x, packed = randn(num_rows, WIDTH), quantise_int8(randn(FEATURES, WIDTH))
    return int8_linear(x, *packed), F.linear(x.float(), unpack_int8_reference(*packed, x.dtype).float())


def int4_products(randn: Randn, num_rows: int) -> Pair:
    x, packed = randn(num_rows, WIDTH), pack_int4(randn(FEATURES, WIDTH))
    return int4_linear(x, *packed), F.linear(x.float(), unpack_int4_reference(*packed, x.dtype).float())


def fp8_products(randn: Randn) -> Pair:
    weight, scale = quantise_rows_reference(randn(FEATURES, WIDTH))
    x = randn(ROWS, WIDTH)
    return fp8_linear(x, weight, scale[:, 0]), fp8_linear_reference(x.float(), weight, scale[:, 0])


def rows_in_fp8(randn: Randn) -> Pair:
    x = randn(ROWS, WIDTH)
    (rows, scale), (expected_rows, expected_scale) = quantise_rows(x), quantise_rows_reference(x)
    return rows.float() * scale, expected_rows.float() * expected_scale


EVERY, HALF = tuple(DTYPES), ("float16", "bfloat16")
# the check of each operator by its name, and the dtypes that the operator supports
CHECKS: dict[str, tuple[Callable[[Randn], Pair], tuple[str, ...]]] = {
    "RMSNorm": (rms_norms, EVERY),
    "sum and RMSNorm": (sums_and_rms_norms, EVERY),
    "LayerNorm": (layer_norms, EVERY),
    "sum and LayerNorm": (sums_and_layer_norms, EVERY),
    "SwiGLU": (swiglus, EVERY),
    "sum of a product": (sums_of_products, EVERY),
    "gated residual": (gated_residuals, EVERY),
    "rotary positions and K/V store": (rotations_and_stores, EVERY),
    "K/V store": (stores, EVERY),
    **{f"int8, {rows} rows": (partial(int8_products, num_rows=rows), HALF) for rows in PRODUCT_ROWS},
    **{f"int4, {rows} rows": (partial(int4_products, num_rows=rows), HALF) for rows in PRODUCT_ROWS},
    "fp8": (fp8_products, ("bfloat16",)),
    "rows in fp8": (rows_in_fp8, EVERY),
}


def tasks() -> Iterator[Task]:
    for operator, (_, dtypes) in CHECKS.items():
        for dtype in dtypes:
            yield Task(
                stage=STAGE,
                case=f"{operator}, {dtype}",
                name="ours",
                function=f"{__name__}:check",
                arguments={"operator": operator, "dtype": dtype},
            )


def check(watch: Stopwatch, sizes: Sizes, *, operator: str, dtype: str) -> Result:
    poison(watch.device)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=watch.device).to(DTYPES[dtype])

    return compare(*CHECKS[operator][0](randn))
