"""The backward pass of media attention: one kernel for the query, one for the pages.

The weights are computed again from the log-sum-exp of the forward pass. Each gradient is summed by one program in a fixed
order, so that two runs agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import jit_runtime, tl
from kernels.configs import launch_config
from kernels.tiles import (
    LOG2_E,
    add_key_gradients,
    add_query_gradient,
    load_tile,
    page_sizes,
    store_tile,
    tiles_of_pages,
)


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


def media_gradients(
    query: Tensor,
    media_kv: Tensor,
    slots: Tensor,
    tiles: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and media_kv.

    query, out, grad_out [T, H, K]; media_kv [M, H, 2, R, K]; slots [T, J]; tiles as in the forward pass; lse [T, H].
    """
    num_pages, num_heads, _, _, head_dim = media_kv.shape
    config = launch_config("media_backward", head_dim, query.dtype)
    sizes = {"BLOCK": config.block, **page_sizes(media_kv)}
    grad_out = grad_out.contiguous()
    delta, grad_query, grad_kv = torch.empty_like(lse), torch.empty_like(out), media_kv.new_empty(media_kv.shape)
    scales = (scale, scale * LOG2_E)
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
    return grad_query, grad_kv
