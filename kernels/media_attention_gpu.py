"""Media attention on a GPU: the Triton kernels of `media_attention`, forward and backward, and their launches.

The backward pass computes weights again from the log-sum-exp of the forward pass. One program sums each gradient in a fixed
order, so two runs agree bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import jit, jit_runtime, launch_config, tl, triton
from kernels.tiles import (
    LOG2_E,
    add_key_gradients,
    add_query_gradient,
    by_row,
    load_tile,
    online_softmax,
    page_sizes,
    store_tile,
    tile_records,
    tiles_of_pages,
)

PROGRAMS = 8 * 132  # enough to fill an H100


def media_tiles(media_slot: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    return tile_records(media_slot, launch_config("media", head_dim, dtype).block)


@jit
def _normed(query, weight, eps, K: tl.constexpr):
    """RMSNorm of each row of a query tile [BLOCK, BLOCK_K]."""
    q = query.to(tl.float32)
    q = q * tl.rsqrt(tl.sum(q * q, 1) / K + eps)[:, None]
    return (q * weight[None, :]).to(query.dtype)


@jit_runtime("tiles", "heads_per_program")  # a specialisation for 1 head would not be pipelined
def _forward(
    query, media_kv, media_scale, tiles, norm_weight, out, lse, scale, eps, query_stride, page_stride, num_heads,
    heads_per_program, R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, NORM: tl.constexpr, INT8: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of rows on one page, head by head: the next head's page is loaded while this one is computed."""
    first = tl.load(tiles + 4 * tl.program_id(0))
    count = tl.load(tiles + 4 * tl.program_id(0) + 1)
    page = tl.load(tiles + 4 * tl.program_id(0) + 2)
    if count == 0:
        return
    rows, keys, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    row_mask = rows < count
    key_mask = keys < R
    row = (first + rows).to(tl.int64)
    query_at = row[:, None] * query_stride + columns[None, :]
    out_at = row[:, None] * num_heads * K + columns[None, :]
    page_at = keys[:, None] * K + columns[None, :]
    first_head = tl.program_id(1) * heads_per_program
    end_head = tl.minimum(first_head + heads_per_program, num_heads)
    if page < 0:
        for head in range(first_head, end_head):
            zeros = tl.zeros([BLOCK, BLOCK_K], tl.float32)
            store_tile(out + head * K, out_at, zeros, row_mask, columns, K, BLOCK_K == K)
            if LSE:
                tl.store(lse + row * num_heads + head, tl.zeros([BLOCK], tl.float32), mask=row_mask)
        return
    if NORM:
        weight = tl.load(norm_weight + columns, mask=columns < K, other=0.0).to(tl.float32)
    media_kv += page.to(tl.int64) * page_stride
    for head in tl.range(first_head, end_head, num_stages=STAGES):
        k = load_tile(media_kv + head * 2 * R * K, page_at, key_mask, columns, K, BLOCK_K == K)  # [BLOCK_R, BLOCK_K]
        v = load_tile(media_kv + (head * 2 + 1) * R * K, page_at, key_mask, columns, K, BLOCK_K == K)
        q = load_tile(query + head * K, query_at, row_mask, columns, K, BLOCK_K == K)  # [BLOCK, BLOCK_K]
        if NORM:
            q = _normed(q, weight, eps, K)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale  # in log2
        if INT8:
            key_scale = media_scale + (page.to(tl.int64) * num_heads + head) * 2 * R + keys
            scores *= tl.load(key_scale, mask=key_mask, other=0.0)[None, :]
        scores = tl.where(key_mask[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        weights = tl.exp2(scores - top[:, None])
        total = tl.sum(weights, 1)
        if INT8:
            weights *= tl.load(key_scale + R, mask=key_mask, other=0.0)[None, :]
        o = tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee") / total[:, None]
        store_tile(out + head * K, out_at, o, row_mask, columns, K, BLOCK_K == K)
        if LSE:
            tl.store(lse + row * num_heads + head, top + tl.log2(total), mask=row_mask)


@jit_runtime("slots", "tiles", "num_slots")
def _forward_all(
    query, media_kv, slots, tiles, out, lse, scale, query_stride, page_stride, num_heads, num_slots, R: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of rows with one list of pages, one head: an online softmax over the pages."""
    first = tl.load(tiles + 4 * tl.program_id(0))
    count = tl.load(tiles + 4 * tl.program_id(0) + 1)
    if count == 0:
        return
    head = tl.program_id(1)
    rows, keys, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    row_mask = rows < count
    row = (first + rows).to(tl.int64)
    page_at = keys[:, None] * K + columns[None, :]
    query_at = row[:, None] * query_stride + columns[None, :]
    q = load_tile(query + head * K, query_at, row_mask, columns, K, BLOCK_K == K)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for slot in range(0, num_slots):
        page = tl.load(slots + first.to(tl.int64) * num_slots + slot)
        key_mask = keys < tl.where(page >= 0, R, 0)
        page_kv = media_kv + tl.maximum(page, 0).to(tl.int64) * page_stride + head * 2 * R * K
        k = load_tile(page_kv, page_at, key_mask, columns, K, BLOCK_K == K)
        v = load_tile(page_kv + R * K, page_at, key_mask, columns, K, BLOCK_K == K)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(key_mask[None, :], scores, float("-inf"))
        top, total, o = online_softmax(scores, v, top, total, o)
    # a row without a page has weights 0 with sum 0, and a log-sum-exp for which the backward's weights are 0, too
    nowhere = total == 0.0
    total = tl.where(nowhere, 1.0, total)
    o = o / total[:, None]
    out_at = row[:, None] * num_heads * K + columns[None, :]
    store_tile(out + head * K, out_at, o, row_mask, columns, K, BLOCK_K == K)
    tl.store(lse + row * num_heads + head, tl.where(nowhere, 0.0, top + tl.log2(total)), mask=row_mask)


def _heads_per_program(num_tiles: int, num_heads: int) -> int:
    """Return a power of two: decode has few tiles and gets about 8 programs per core; prefill pipelines several heads."""
    heads = min(max(num_tiles * num_heads // PROGRAMS, 1), num_heads)
    return 1 << (heads.bit_length() - 1)


def launch_media(
    query: Tensor,
    media_kv: Tensor,
    slots: Tensor,
    tiles: Tensor,
    scale: float,
    norm: tuple[Tensor, float] | None = None,
    media_scale: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    num_tokens, num_heads, head_dim = query.shape
    config = launch_config("media", head_dim, query.dtype)
    out = query.new_empty(query.shape)
    if slots.dim() == 2:
        lse = query.new_empty(num_tokens, num_heads, dtype=torch.float32) if lse is None else lse
        _forward_all[(len(tiles), num_heads)](
            query, media_kv, slots, tiles, out, lse, scale * LOG2_E, query.stride(0), media_kv.stride(0), num_heads,
            slots.shape[1], BLOCK=config.block, **page_sizes(media_kv), **config.options,
        )  # fmt: skip
        return out
    weight, eps = norm or (None, 0.0)
    heads = _heads_per_program(len(tiles), num_heads)
    _forward[(len(tiles), triton.cdiv(num_heads, heads))](
        query, media_kv, media_scale, tiles, weight, out, lse, scale * LOG2_E, eps, query.stride(0), media_kv.stride(0),
        num_heads, heads, BLOCK=config.block, NORM=norm is not None, INT8=media_scale is not None, LSE=lse is not None,
        STAGES=config.num_stages, **page_sizes(media_kv), **config.options,
    )  # fmt: skip
    return out


@jit_runtime("slots", "tiles", "num_slots")
def _query_gradient(
    query, media_kv, slots, tiles, out, grad_out, lse, delta, grad_query, scale, log2_scale, query_stride, page_stride,
    num_heads, num_slots, R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The query's gradient for one tile and head; delta, the sum over K of out * grad_out, is stored for the pages."""
    first = tl.load(tiles + 4 * tl.program_id(0))
    count = tl.load(tiles + 4 * tl.program_id(0) + 1)
    if count == 0:
        return
    head = tl.program_id(1)
    rows, keys, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    row_mask = rows < count
    row = (first + rows).to(tl.int64)
    page_at = keys[:, None] * K + columns[None, :]
    out_at = row[:, None] * num_heads * K + columns[None, :]
    q = load_tile(query + head * K, row[:, None] * query_stride + columns[None, :], row_mask, columns, K, BLOCK_K == K)
    o = load_tile(out + head * K, out_at, row_mask, columns, K, BLOCK_K == K)
    grad_o = load_tile(grad_out + head * K, out_at, row_mask, columns, K, BLOCK_K == K)
    row_delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), 1)
    tl.store(delta + row * num_heads + head, row_delta, mask=row_mask)
    row_lse = tl.load(lse + row * num_heads + head, mask=row_mask, other=float("inf"))
    grad_q = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for slot in range(0, num_slots):
        page = tl.load(slots + first.to(tl.int64) * num_slots + slot)
        key_mask = keys < tl.where(page >= 0, R, 0)
        page_kv = media_kv + tl.maximum(page, 0).to(tl.int64) * page_stride + head * 2 * R * K
        k = load_tile(page_kv, page_at, key_mask, columns, K, BLOCK_K == K)
        v = load_tile(page_kv + R * K, page_at, key_mask, columns, K, BLOCK_K == K)
        grad_q = add_query_gradient(grad_q, q, grad_o, row_lse, row_delta, k, v, key_mask, scale, log2_scale)
    store_tile(grad_query + head * K, out_at, grad_q, row_mask, columns, K, BLOCK_K == K)


@jit_runtime("tiles", "page_starts", "page_tiles")
def _page_gradients(
    query, media_kv, tiles, page_starts, page_tiles, grad_out, lse, delta, grad_kv, scale, log2_scale, query_stride,
    page_stride, num_heads, R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of one page and head: the tiles that read it, one after the other, without atomics."""
    page, head = tl.program_id(0), tl.program_id(1)
    rows, keys, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    key_mask = keys < R
    page_at = keys[:, None] * K + columns[None, :]
    page_kv = media_kv + page.to(tl.int64) * page_stride + head * 2 * R * K
    k = load_tile(page_kv, page_at, key_mask, columns, K, BLOCK_K == K)
    v = load_tile(page_kv + R * K, page_at, key_mask, columns, K, BLOCK_K == K)
    grad_k = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    grad_v = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for entry in range(tl.load(page_starts + page), tl.load(page_starts + page + 1)):
        tile = tl.load(page_tiles + entry)
        first, count = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
        row_mask = rows < count
        row = (first + rows).to(tl.int64)
        q = load_tile(
            query + head * K, row[:, None] * query_stride + columns[None, :], row_mask, columns, K, BLOCK_K == K
        )
        out_at = row[:, None] * num_heads * K + columns[None, :]
        grad_o = load_tile(grad_out + head * K, out_at, row_mask, columns, K, BLOCK_K == K)
        row_lse = tl.load(lse + row * num_heads + head, mask=row_mask, other=float("inf"))
        row_delta = tl.load(delta + row * num_heads + head, mask=row_mask, other=0.0)
        grad_k, grad_v = add_key_gradients(grad_k, grad_v, k, v, q, grad_o, row_lse, row_delta, scale, log2_scale)
    grad_page = grad_kv + (page.to(tl.int64) * num_heads + head) * 2 * R * K
    store_tile(grad_page, page_at, grad_k, key_mask, columns, K, BLOCK_K == K)
    store_tile(grad_page + R * K, page_at, grad_v, key_mask, columns, K, BLOCK_K == K)


class DifferentiableMediaAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, media_kv: Tensor, slots: Tensor, tiles: Tensor, scale: float) -> Tensor:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        out = launch_media(query, media_kv, slots, tiles, scale, lse=lse)
        ctx.save_for_backward(query, media_kv, slots, tiles, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query, media_kv, slots, tiles, out, lse = ctx.saved_tensors
        slots, grad_out = by_row(slots), grad_out.contiguous()
        num_pages, num_heads, _, _, head_dim = media_kv.shape
        config = launch_config("media_backward", head_dim, query.dtype)
        sizes = {"BLOCK": config.block, **page_sizes(media_kv)}
        delta, grad_query, grad_kv = torch.empty_like(lse), torch.empty_like(out), media_kv.new_empty(media_kv.shape)
        scales = (ctx.scale, ctx.scale * LOG2_E)
        strides = (query.stride(0), media_kv.stride(0), num_heads)
        _query_gradient[(len(tiles), num_heads)](
            query, media_kv, slots, tiles, out, grad_out, lse, delta, grad_query, *scales, *strides, slots.shape[1],
            **sizes, **config.options,
        )  # fmt: skip
        page_starts, page_tiles = tiles_of_pages(tiles, slots, num_pages)
        _page_gradients[(num_pages, num_heads)](
            query, media_kv, tiles, page_starts, page_tiles, grad_out, lse, delta, grad_kv, *scales, *strides,
            **sizes, **config.options,
        )  # fmt: skip
        return grad_query, grad_kv, None, None, None
