# mypy: disable-error-code="no-untyped-def"
"""Media attention's decode written in other ways, to be measured beside the served kernel and never served.

One asks for a page before the kernel in front of it has ended (programmatic dependent launch, PDL), one has no matrix
instructions. Each takes what the served launch takes; what this machine cannot run raises.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from kernels.backend import BackendError, Kernel, jit_runtime, tl, use_triton
from kernels.configs import LOG2_E, architecture, launch_config
from kernels.media_attention import page_sizes
from kernels.tile_access import load_tile, store_tile

Variant = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


@jit_runtime("tiles")
def _early_loads(
    query,
    media_kv,
    tiles,
    out,
    scale,
    query_stride,
    page_stride,
    num_heads,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile, one head, no loop: all of K and V is on its way before the query is waited for.

    The table and the pages must be older than the kernel in front, the query may be its work. No program leaves
    before the wait: a grid that ends without having waited would let the next one overtake the last.
    """
    first = tl.load(tiles + 4 * tl.program_id(0))
    count = tl.load(tiles + 4 * tl.program_id(0) + 1)
    page = tl.load(tiles + 4 * tl.program_id(0) + 2)
    head = tl.program_id(1)
    rows, keys, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    real = rows < count
    there = keys < tl.where((page >= 0) & (count > 0), R, 0)
    page_kv = media_kv + tl.maximum(page, 0).to(tl.int64) * page_stride + head * 2 * R * K
    # K is addressed transposed: transposed in registers, its round trip would stand in front of V's loads
    across = there[None, :] if BLOCK_K == K else there[None, :] & (columns < K)[:, None]
    k = tl.load(page_kv + keys[None, :] * K + columns[:, None], mask=across, other=0.0)  # [BLOCK_K, BLOCK_R]
    v = load_tile(page_kv + R * K, keys[:, None] * K + columns[None, :], there, columns, K, BLOCK_K == K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = (first + rows).to(tl.int64)
    q = load_tile(query + head * K, row[:, None] * query_stride + columns[None, :], real, columns, K, BLOCK_K == K)
    scores = tl.dot(q, k, input_precision="ieee") * scale  # in log2
    scores = tl.where((keys < R)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    o = tl.dot(weights.to(q.dtype), v, input_precision="ieee") / tl.sum(weights, 1)[:, None]
    o = tl.where(page >= 0, o, 0.0)  # by choice and not by product: the query may be NaN
    store_tile(out + head * K, row[:, None] * num_heads * K + columns[None, :], o, real, columns, K, BLOCK_K == K)


@jit_runtime("tiles")
def _multiply_add(
    query,
    media_kv,
    tiles,
    out,
    scale,
    query_stride,
    page_stride,
    num_heads,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile, one head, row after row in float32: a matrix unit would multiply 15 empty rows at decode.

    The page is named again for each row: held over the rows in float32 it would take twice the registers.
    """
    first = tl.load(tiles + 4 * tl.program_id(0))
    count = tl.load(tiles + 4 * tl.program_id(0) + 1)
    page = tl.load(tiles + 4 * tl.program_id(0) + 2)
    head = tl.program_id(1)
    keys, columns = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    inside = columns < K
    there = keys < tl.where((page >= 0) & (count > 0), R, 0)
    page_kv = media_kv + tl.maximum(page, 0).to(tl.int64) * page_stride + head * 2 * R * K
    page_at = keys[:, None] * K + columns[None, :]
    for row in range(first, first + count):
        k = load_tile(page_kv, page_at, there, columns, K, BLOCK_K == K).to(tl.float32)
        v = load_tile(page_kv + R * K, page_at, there, columns, K, BLOCK_K == K).to(tl.float32)
        at = tl.cast(row, tl.int64)
        q = tl.load(query + at * query_stride + head * K + columns, mask=inside, other=0.0).to(tl.float32)
        scores = tl.where(keys < R, tl.sum(k * q[None, :], 1) * scale, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 0))
        o = tl.sum(weights[:, None] * v, 0) / tl.sum(weights, 0)
        o = tl.where(page >= 0, o, 0.0)
        tl.store(out + (at * num_heads + head) * K + columns, o.to(out.dtype.element_ty), mask=inside)


def has_pdl() -> bool:
    """Hopper and later; the interpreter knows no such wait."""
    kind, _, number = architecture().partition("_")
    return kind == "sm" and int(number) >= 90


def _runnable(query: Tensor, slots: Tensor, tiles: Tensor | None) -> Tensor:
    if tiles is None or not use_triton(query):
        raise BackendError("a variant of the kernel runs on a GPU only")
    if slots.dim() == 2:
        raise ValueError(f"a variant serves tokens of one page each, and was given {slots.shape[1]}")
    return tiles


def early_loads(
    query: Tensor, media_kv: Tensor, slots: Tensor, tiles: Tensor | None, scale: float, *, pdl: bool = False
) -> Tensor:
    """pdl: launched while the kernel in front still runs."""
    table = _runnable(query, slots, tiles)
    if pdl and not has_pdl():
        raise BackendError(f"PDL needs a GPU of sm_90 or later, this is {architecture()}")
    config = launch_config("media", query.shape[2], query.dtype)
    options = {**config.options, "launch_pdl": True} if pdl else config.options  # other backends know no such option
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
