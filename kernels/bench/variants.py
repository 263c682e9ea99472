"""Variants of media attention for decode, for comparison with the production kernel; the server never uses them.

The first requests a page before the preceding kernel has finished (programmatic dependent launch, PDL), the second uses no
matrix instructions. Each takes the inputs of the production launch. It raises `BackendError` if this machine cannot run it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from kernels.backend import BackendError, Kernel, architecture, jit_runtime, launch_config, tl, use_triton
from kernels.tiles import LOG2_E, load_tile, page_sizes, store_tile

Variant = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


@jit_runtime("tiles")
def _early_loads(
    query, media_kv, tiles, out, scale, query_stride, page_stride, num_heads, R: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute one tile and one head without a loop, and request all of K and V before waiting for the query.

    The preceding kernel may write the query, but not the table or the pages. Every program waits before it exits: if a
    grid ended without a wait, the next grid could start before the preceding one has finished.
    """
    first = tl.load(tiles + 4 * tl.program_id(0))
    count = tl.load(tiles + 4 * tl.program_id(0) + 1)
    page = tl.load(tiles + 4 * tl.program_id(0) + 2)
    head = tl.program_id(1)
    rows, keys, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    is_row = rows < count
    is_key = keys < tl.where((page >= 0) & (count > 0), R, 0)
    page_kv = media_kv + tl.maximum(page, 0).to(tl.int64) * page_stride + head * 2 * R * K
    # K is loaded transposed: a transposition in registers would delay the loads of V.
    key_mask = is_key[None, :] if BLOCK_K == K else is_key[None, :] & (columns < K)[:, None]
    k = tl.load(page_kv + keys[None, :] * K + columns[:, None], mask=key_mask, other=0.0)  # [BLOCK_K, BLOCK_R]
    v = load_tile(page_kv + R * K, keys[:, None] * K + columns[None, :], is_key, columns, K, BLOCK_K == K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = (first + rows).to(tl.int64)
    q = load_tile(query + head * K, row[:, None] * query_stride + columns[None, :], is_row, columns, K, BLOCK_K == K)
    scores = tl.dot(q, k, input_precision="ieee") * scale  # in log2
    scores = tl.where((keys < R)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    o = tl.dot(weights.to(q.dtype), v, input_precision="ieee") / tl.sum(weights, 1)[:, None]
    o = tl.where(page >= 0, o, 0.0)  # a selection and not a product, because the query may be NaN
    store_tile(out + head * K, row[:, None] * num_heads * K + columns[None, :], o, is_row, columns, K, BLOCK_K == K)


@jit_runtime("tiles")
def _multiply_add(
    query, media_kv, tiles, out, scale, query_stride, page_stride, num_heads, R: tl.constexpr, K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile and one head row by row in float32, because a matrix unit would multiply 15 empty rows at decode.

    Each row loads the page again: keeping a page in float32 for all rows would need twice the registers.
    """
    first = tl.load(tiles + 4 * tl.program_id(0))
    count = tl.load(tiles + 4 * tl.program_id(0) + 1)
    page = tl.load(tiles + 4 * tl.program_id(0) + 2)
    head = tl.program_id(1)
    keys, columns = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    is_column = columns < K
    is_key = keys < tl.where((page >= 0) & (count > 0), R, 0)
    page_kv = media_kv + tl.maximum(page, 0).to(tl.int64) * page_stride + head * 2 * R * K
    offsets = keys[:, None] * K + columns[None, :]
    for row in range(first, first + count):
        k = load_tile(page_kv, offsets, is_key, columns, K, BLOCK_K == K).to(tl.float32)
        v = load_tile(page_kv + R * K, offsets, is_key, columns, K, BLOCK_K == K).to(tl.float32)
        row_index = tl.cast(row, tl.int64)
        q = tl.load(query + row_index * query_stride + head * K + columns, mask=is_column, other=0.0).to(tl.float32)
        scores = tl.where(keys < R, tl.sum(k * q[None, :], 1) * scale, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 0))
        o = tl.sum(weights[:, None] * v, 0) / tl.sum(weights, 0)
        o = tl.where(page >= 0, o, 0.0)
        tl.store(out + (row_index * num_heads + head) * K + columns, o.to(out.dtype.element_ty), mask=is_column)


def has_pdl() -> bool:
    """Return whether the GPU supports PDL: Hopper and later. The interpreter does not."""
    kind, _, number = architecture().partition("_")
    return kind == "sm" and int(number) >= 90


def _runnable(query: Tensor, slots: Tensor, tiles: Tensor | None) -> Tensor:
    if tiles is None or not use_triton(query):
        raise BackendError("the variants of the kernel run only on a GPU")
    if slots.dim() == 2:
        raise ValueError(f"the variants of the kernel take one page per token, got {slots.shape[1]}")
    return tiles


def early_loads(
    query: Tensor, media_kv: Tensor, slots: Tensor, tiles: Tensor | None, scale: float, *, pdl: bool = False
) -> Tensor:
    """Run the variant without a loop. With `pdl`, it is launched while the preceding kernel still runs."""
    table = _runnable(query, slots, tiles)
    if pdl and not has_pdl():
        raise BackendError(f"PDL needs a GPU of sm_90 or later, got {architecture()}")
    config = launch_config("media", query.shape[2], query.dtype)
    options = {**config.options, "launch_pdl": True} if pdl else config.options  # other backends reject the option
    return _start(_early_loads, query, media_kv, table, scale, BLOCK=config.block, PDL=pdl, **options)


def multiply_add(query: Tensor, media_kv: Tensor, slots: Tensor, tiles: Tensor | None, scale: float) -> Tensor:
    table = _runnable(query, slots, tiles)
    config = launch_config("media", query.shape[2], query.dtype)
    return _start(_multiply_add, query, media_kv, table, scale, **config.options)


def _start(
    kernel: Kernel, query: Tensor, media_kv: Tensor, tiles: Tensor, scale: float, **options: int | bool
) -> Tensor:
    out = query.new_empty(query.shape)
    num_heads = query.shape[1]
    kernel[(len(tiles), num_heads)](
        query, media_kv, tiles, out, scale * LOG2_E, query.stride(0), media_kv.stride(0), num_heads,
        **page_sizes(media_kv), **options,
    )  # fmt: skip
    return out


VARIANTS: dict[str, Variant] = {
    "variant, no loop": early_loads,
    "variant, no loop, PDL": partial(early_loads, pdl=True),
    "variant, FMA": multiply_add,
}
