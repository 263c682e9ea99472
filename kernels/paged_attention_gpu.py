"""Paged attention on a GPU: the Triton kernels of `paged_attention`, and their launch over the tiles of a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import jit, jit_runtime, launch_config, tl, triton
from kernels.paged_plan import TilePlan, Tiles
from kernels.spans import Offsets
from kernels.tiles import LOG2_E, block_width, load_tile, online_softmax, rotary_partner, store_tile


@jit
def _load_rotated_back(
    query, head_at, mask, columns, cos, sin, offset, K: tl.constexpr, ROTARY: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Load a tile of queries, rotated back by the angles of an offset, which are a row of the tables cos and sin."""
    partner = rotary_partner(columns, ROTARY)
    at = offset.to(tl.int64) * ROTARY + columns
    cosine = tl.load(cos + at, mask=columns < ROTARY, other=1.0)[None, :]
    sine = tl.load(sin + at, mask=columns < ROTARY, other=0.0)[None, :]
    q = load_tile(query, head_at + columns[None, :], mask, columns, K, EVEN)
    other = load_tile(query, head_at + partner[None, :], mask, columns, K, EVEN)
    return (q.to(tl.float32) * cosine - other.to(tl.float32) * sine).to(q.dtype)


@jit
def _load_entries(block_table, keys, slot, is_read, B: tl.constexpr):
    """Load the block and the position of the key of each slot; slots that are not read have a key after all queries."""
    block = tl.load(block_table + slot // B, mask=is_read, other=0)
    return block, tl.load(keys + slot, mask=is_read, other=1 << 30)


@jit_runtime(
    "block_table", "keys", "offsets", "records", "members", "num_rows", "table_stride", "keys_stride", "offsets_stride",
    "split",
)  # fmt: skip
def _attend_tile(
    query, kv_cache, block_table, keys, offsets, cos, sin, records, members, slopes, out, lse, scale, query_stride,
    block_stride, num_heads, num_rows, table_stride, keys_stride, offsets_stride, split, GROUP: tl.constexpr,
    B: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr,
    ROTARY: tl.constexpr, ALIBI: tl.constexpr, PARTIAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of rows, all query heads of one key head, over one part of the slots of a table that the rows share.

    STEP slots are read at a time. The entries of the tables are read one step earlier, so that the addresses of keys and
    values wait for no other load, and STAGES - 1 steps of them are in flight. ROTARY is the number of elements that offsets
    rotate, 0 without offsets; with offsets, the slots of a step belong to one block, which has one offset.
    """
    record = records + 5 * tl.program_id(0)
    count = tl.load(record + 1)
    if count == 0:
        return
    first, sequence = tl.load(record), tl.load(record + 2).to(tl.int64)
    block_table += sequence * table_stride
    keys += sequence * keys_stride
    part, end = tl.load(record + 3), tl.load(record + 4)
    kv_head = tl.program_id(1)
    index, lanes, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    head = kv_head * GROUP + index % GROUP
    mask = index // GROUP < count
    member = members + 3 * (first + index // GROUP)
    row = tl.load(member, mask=mask, other=0).to(tl.int64)
    position = tl.load(member + 2, mask=mask, other=-1)
    head_at = (row * query_stride + head * K)[:, None]
    q = load_tile(query, head_at + columns[None, :], mask, columns, K, BLOCK_K == K)  # [BLOCK, BLOCK_K]
    if ROTARY:
        offsets += sequence * offsets_stride
    if ALIBI:
        slope = tl.load(slopes + head, mask=mask, other=0.0) * 1.4426950408889634  # log2(e)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    last = tl.max(position, 0)
    heads_kv = kv_cache + kv_head * B * K
    num_kv_heads = num_heads // GROUP
    is_lane = lanes < STEP
    slot = part * split + lanes
    block, key = _load_entries(block_table, keys, slot, is_lane & (slot < end), B)
    for start in tl.range(part * split, end, STEP, num_stages=STAGES):
        slot = start + lanes
        if ROTARY:
            offset = tl.load(offsets + start // B)
            q = _load_rotated_back(query, head_at, mask, columns, cos, sin, offset, K, ROTARY, BLOCK_K == K)
        key_mask = key <= last
        at = (block.to(tl.int64) * block_stride + slot % B * K)[:, None] + columns[None, :]
        k = load_tile(heads_kv, at, key_mask, columns, K, BLOCK_K == K)  # [BLOCK_N, BLOCK_K]
        v = load_tile(heads_kv + num_kv_heads * B * K, at, key_mask, columns, K, BLOCK_K == K)
        next_slot = slot + STEP
        next_block, next_key = _load_entries(block_table, keys, next_slot, is_lane & (next_slot < end), B)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # in log2
        distance = key[None, :] - position[:, None]
        if ALIBI:
            scores += slope[:, None] * distance.to(tl.float32)
        scores = tl.where(distance <= 0, scores, float("-inf"))
        top, total, o = online_softmax(scores, v, top, total, o)
        block, key = next_block, next_key
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    o = o / total[:, None]
    out_row = tl.load(member + 1, mask=mask, other=0).to(tl.int64)  # loaded here, because the loop needs all registers
    if PARTIAL:
        out_row += part.to(tl.int64) * num_rows
        tl.store(lse + out_row * num_heads + head, tl.where(empty, float("-inf"), top + tl.log2(total)), mask=mask)
    out_at = (out_row * num_heads + head)[:, None] * K + columns[None, :]
    store_tile(out, out_at, o, mask, columns, K, BLOCK_K == K)


@jit_runtime("rows", "num_rows")
def _merge_parts(
    parts, lse, rows, out, num_rows, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Sum the parts of BLOCK_H heads of one row in order, each weighted by its log-sum-exp."""
    out_row = tl.program_id(0).to(tl.int64)
    row, num_parts = tl.load(rows + 2 * out_row).to(tl.int64), tl.load(rows + 2 * out_row + 1)
    heads, columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    mask = heads < H
    at = heads[:, None] * K + columns[None, :]
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    for part in range(0, num_parts):
        part_lse = tl.load(lse + (part * num_rows + out_row) * H + heads, mask=mask, other=float("-inf"))
        top = tl.maximum(top, part_lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    for part in range(0, num_parts):
        part_at = (part * num_rows + out_row) * H
        weight = tl.exp2(tl.load(lse + part_at + heads, mask=mask, other=float("-inf")) - top)
        total += weight
        o += weight[:, None] * load_tile(parts + part_at * K, at, weight > 0.0, columns, K, BLOCK_K == K)
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    store_tile(out + row * H * K, at, o, mask, columns, K, BLOCK_K == K)


def attend_tiles(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    plan: TilePlan,
    scale: float,
    slopes: Tensor | None,
) -> Tensor:
    """Attend to the cache [N, 2, G, B, K] with the tiles of a plan: query [T, H, K] -> [T, H, K]."""
    assert plan.keys is not None
    out = query.new_empty(query.shape)
    inputs = (query, kv_cache, block_table, plan.keys, plan.offsets)
    if plan.many is not None:
        _launch(*inputs, plan.many, scale, slopes, out, None)
    if plan.few is not None:
        _, num_heads, head_dim = query.shape
        num_rows = len(plan.few.rows)
        parts = query.new_empty(plan.few.num_parts, num_rows, num_heads, head_dim, dtype=torch.float32)
        lse = query.new_empty(parts.shape[:3], dtype=torch.float32)
        _launch(*inputs, plan.few, scale, slopes, parts, lse)
        _merge_parts[(num_rows, triton.cdiv(num_heads, 8))](
            parts, lse, plan.few.rows, out, num_rows, H=num_heads, K=head_dim, BLOCK_H=8, BLOCK_K=block_width(head_dim),
            **launch_config("row", head_dim, query.dtype).options,
        )  # fmt: skip
    return out


def _launch(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    keys: Tensor,
    offsets: Offsets | None,
    tiles: Tiles,
    scale: float,
    slopes: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    if not len(tiles.records):
        return
    blocks, cos, sin = (None, None, None) if offsets is None else (offsets.blocks, offsets.cos, offsets.sin)
    step = 64 if offsets is None else min(block_size, 64)
    _attend_tile[(len(tiles.records), num_kv_heads)](
        query, kv_cache, block_table, keys, blocks, cos, sin, tiles.records, tiles.members, slopes, out, lse,
        scale * LOG2_E, query.stride(0), kv_cache.stride(0), num_heads, len(tiles.rows), block_table.stride(0),
        keys.stride(0), 0 if blocks is None else blocks.stride(0), tiles.split, GROUP=num_heads // num_kv_heads,
        B=block_size, K=head_dim, BLOCK=tiles.launch.block, BLOCK_N=max(16, step), STEP=step, BLOCK_K=block_width(head_dim),
        ROTARY=0 if cos is None else cos.shape[1], ALIBI=slopes is not None, PARTIAL=lse is not None,
        STAGES=tiles.launch.num_stages, **tiles.launch.options,
    )  # fmt: skip
