"""Masked cross-attention: each text token attends to the R keys of one media page, or to none (Flamingo, section 3.1.3).

A token names its page by number, so that no mask of tokens times media exists; a token without a page gets exactly zero.
With several pages per token (the "all previous images" ablation) the softmax is over all their keys.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from kernels.backend import jit, jit_runtime, tl, triton, use_triton
from kernels.configs import launch_config
from kernels.media_gradients import media_gradients
from kernels.media_runs import MediaRuns, attend_by_runs
from kernels.norm import rms_norm, rms_norm_reference
from kernels.tiles import (
    LOG2_E,
    by_row,
    load_tile,
    online_softmax,
    page_sizes,
    store_tile,
    tile_records,
    with_whole_heads,
)

PROGRAMS = 8 * 132  # enough to fill an H100

# which rows read which page, built once per step: the tile table of `media_tiles` for Triton, runs for torch
MediaPlan: TypeAlias = Tensor | MediaRuns


def media_attention_reference(
    query: Tensor,
    media_kv: Tensor,
    media_slot: Tensor,
    *,
    scale: float,
    query_norm: Tensor | None = None,
    query_norm_eps: float = 1e-6,
    media_scale: Tensor | None = None,
    plan: MediaPlan | None = None,
) -> Tensor:
    """Dense and slow: every token has its own copy of its pages. A page that is named twice counts twice."""
    q = query.float()
    if query_norm is not None:
        q = rms_norm_reference(q, query_norm, query_norm_eps)
    slots = by_row(media_slot).long()  # [T, J]
    pages = _dequantised(media_kv, media_scale)[slots.clamp(min=0)].float()  # [T, J, H, 2, R, K]
    absent = (slots < 0)[:, :, None, None, None]
    keys, values = (pages[:, :, :, i].masked_fill(absent, 0.0) for i in (0, 1))
    scores = torch.einsum("thk,tjhrk->thjr", q, keys) * scale
    scores = scores.masked_fill((slots < 0)[:, None, :, None], float("-inf"))
    # a row of -inf alone would be NaN; its weights are masked to zero, and so is its output
    nowhere = (slots < 0).all(1)[:, None, None, None]
    weights = scores.masked_fill(nowhere, 0.0).flatten(2).softmax(-1).view(scores.shape)
    weights = weights.masked_fill((slots < 0)[:, None, :, None], 0.0)
    return torch.einsum("thjr,tjhrk->thk", weights, values).to(query.dtype)


def quantise_pages(media_kv: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise pages to 8 bits: [M, H, 2, R, K] -> int8 of that shape, and a float32 scale per key or value [M, H, 2, R].

    Pages of 8 bits are optional; the server does not use them yet.
    """
    media_scale = media_kv.float().abs().amax(-1).clamp(min=1e-30) / 127
    return (media_kv.float() / media_scale[..., None]).round().to(torch.int8), media_scale


def _dequantised(media_kv: Tensor, media_scale: Tensor | None) -> Tensor:
    return media_kv if media_scale is None else media_kv.float() * media_scale[..., None]


@jit
def _normed(query, weight, eps, K: tl.constexpr):
    """RMSNorm of each row of a query tile [BLOCK, BLOCK_K]."""
    q = query.to(tl.float32)
    q = q * tl.rsqrt(tl.sum(q * q, 1) / K + eps)[:, None]
    return (q * weight[None, :]).to(query.dtype)


@jit_runtime("tiles", "heads_per_program")  # specialised for 1 head, it would lose its pipeline
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
    # a row without a page: weights 0 of total 0, and a log-sum-exp that makes the backward's weights 0 as well
    nowhere = total == 0.0
    total = tl.where(nowhere, 1.0, total)
    o = o / total[:, None]
    out_at = row[:, None] * num_heads * K + columns[None, :]
    store_tile(out + head * K, out_at, o, row_mask, columns, K, BLOCK_K == K)
    tl.store(lse + row * num_heads + head, tl.where(nowhere, 0.0, top + tl.log2(total)), mask=row_mask)


def _heads_per_program(num_tiles: int, num_heads: int) -> int:
    """Return a power of two: about 8 programs per core for decode, which has few tiles, and heads in flight for prefill."""
    heads = min(max(num_tiles * num_heads // PROGRAMS, 1), num_heads)
    return 1 << (heads.bit_length() - 1)


def _launch(
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


class _MediaAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, media_kv: Tensor, slots: Tensor, tiles: Tensor, scale: float) -> Tensor:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        out = _launch(query, media_kv, slots, tiles, scale, lse=lse)
        ctx.save_for_backward(query, media_kv, slots, tiles, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query, media_kv, slots, tiles, out, lse = ctx.saved_tensors
        return *media_gradients(query, media_kv, by_row(slots), tiles, out, lse, grad_out, ctx.scale), None, None, None


def _checked(media_kv: Tensor, *, may_copy: bool) -> Tensor:
    """Return pages in the layout that the kernel reads; new projections may be copied, a pool must have it already."""
    num_keys, head_dim = media_kv.shape[3:]
    inner = (2 * num_keys * head_dim, num_keys * head_dim, head_dim, 1)
    if media_kv.stride()[1:] != inner:
        if may_copy:
            return media_kv.contiguous()
        raise ValueError(f"media_kv has strides {media_kv.stride()[1:]} within a page, the kernel requires {inner}")
    if head_dim % 16 == 0 and media_kv.stride(0) % 16:
        raise ValueError(f"media_kv has a page stride of {media_kv.stride(0)}, which is not a multiple of 16")
    return media_kv


def media_tiles(media_slot: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    return tile_records(media_slot, launch_config("media", head_dim, dtype).block)


def plan_media(x: Tensor, media_slot: Tensor | None, head_dim: int) -> MediaPlan | None:
    """Return the plan that all layers of a step share, for the backend and dtype of `x`; None if no token reads a page."""
    if media_slot is None:
        return None
    return media_tiles(media_slot, head_dim, x.dtype) if use_triton(x) else MediaRuns(media_slot)


def media_attention(
    query: Tensor,
    media_kv: Tensor,
    media_slot: Tensor,
    *,
    scale: float,
    query_norm: Tensor | None = None,
    query_norm_eps: float = 1e-6,
    media_scale: Tensor | None = None,
    plan: MediaPlan | None = None,
) -> Tensor:
    """Attend from each token to the keys of its pages: query [T, H, K] -> [T, H, K].

    media_kv [M, H, 2, R, K] may be a view of the pool. media_slot [T] or [T, J] names pages, -1 for none. query_norm [K] is
    the RMSNorm of each head's query. media_scale [M, H, 2, R] is for int8 pages. `plan` comes from `plan_media`.

    Raises `ValueError` for pages in a layout that the kernel cannot read.
    """
    grad = torch.is_grad_enabled() and (query.requires_grad or media_kv.requires_grad)
    if not use_triton(query):
        if query_norm is not None:
            query = rms_norm(query, query_norm, query_norm_eps)
        runs = plan if isinstance(plan, MediaRuns) else MediaRuns(media_slot)
        return attend_by_runs(query, _dequantised(media_kv, media_scale).to(query.dtype), runs, scale)
    if query_norm is not None and (grad or media_slot.dim() == 2):  # the kernel's own norm has no gradient
        query, query_norm = rms_norm(query, query_norm, query_norm_eps), None
    if media_scale is not None and (grad or media_slot.dim() == 2):
        raise ValueError("media_scale (pages of 8 bits) requires one page per token and no gradients")
    query = with_whole_heads(query)
    media_kv = _checked(media_kv, may_copy=grad)
    tiles = plan if isinstance(plan, Tensor) else media_tiles(media_slot, query.shape[2], query.dtype)
    if grad:
        out: Tensor = _MediaAttention.apply(query, media_kv, media_slot, tiles, scale)
        return out
    norm = None if query_norm is None else (query_norm, query_norm_eps)
    return _launch(query, media_kv, media_slot, tiles, scale, norm, media_scale)
