"""Causal self-attention over the blocks of the K/V cache: prefill and decode of any mix of sequences.

The first `num_shared_blocks` blocks may be the same for every sequence (a support set). They are then read once for the
whole batch, and merged with the rest of each sequence by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kernels.backend import Launch, jit_runtime, launch_config, tl, triton, use_triton
from kernels.paged_attention_cpu import GatherPlan, attend, gather_blocks, gather_plan
from kernels.spans import Spans
from kernels.tiles import LOG2_E, block_width, load_tile, online_softmax, store_tile, tile_records, with_whole_heads

# Decode cuts a context at every SPLIT keys, whatever its length and batch: a row's sums are then the same in every batch.
# One sequence of 1,000 tokens and 32 heads gives 128 programs, about one per core of an H100.
SPLIT = 256
WHOLE = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """Tables that all layers of one step share, built by `paged_plan` from host memory or on the device."""

    positions: Tensor  # [T] int32, of each row in its sequence; -1 for a padded row
    tiles: Tensor  # rows of one sequence
    shared_tiles: Tensor | None  # rows of any sequence, for the shared blocks
    launch: Launch
    split: int

    def to(self, device: torch.device) -> Plan:
        shared = None if self.shared_tiles is None else self.shared_tiles.to(device)
        return replace(self, positions=self.positions.to(device), tiles=self.tiles.to(device), shared_tiles=shared)


def paged_attention_reference(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    num_shared_blocks: int = 0,
    spans: Spans | None = None,
    plan: Plan | GatherPlan | None = None,
) -> Tensor:
    """The specification; `num_shared_blocks` is a promise about block_table that does not change the result."""
    block_size, group = kv_cache.shape[3], query.shape[1] // kv_cache.shape[2]
    slopes = query.new_zeros(query.shape[1]) if alibi_slopes is None else alibi_slopes.float()
    outputs, sequences = [query[:0].float()], pairwise(query_starts.tolist())
    for row, ((first, end), context) in enumerate(zip(sequences, context_lengths.tolist(), strict=True)):
        width = -(-context // block_size)
        keys = torch.arange(context, device=query.device)
        positions, is_valid = keys[context - (end - first) :], torch.ones_like(keys, dtype=torch.bool)
        if spans is not None:
            keys, is_empty = (
                x[0, :context] for x in spans.select(slice(first, end), [row]).keys(slice(width), block_size)
            )
            positions, is_valid = spans.positions[first:end], ~is_empty
        kv = gather_blocks(kv_cache, block_table[row, :width])[:, :, :context][:, :, is_valid]
        key, value = kv.float().repeat_interleave(group, 1)  # [H, C, K] each
        distance = keys[is_valid] - positions[:, None]  # [Q, C]
        scores = torch.einsum("qhk,hck->hqc", query[first:end].float(), key) * scale
        scores = (scores + slopes[:, None, None] * distance).masked_fill(distance > 0, float("-inf"))
        outputs.append(torch.einsum("hqc,hck->qhk", scores.softmax(-1), value))
    return torch.cat(outputs).to(query.dtype)


@jit_runtime(
    "block_table", "tiles", "positions", "num_tokens", "table_width", "key_begin", "key_end", "split", "first_part"
)
def _attend_blocks(
    query, kv_cache, block_table, tiles, positions, slopes, out, lse, scale, query_stride, block_stride, num_heads,
    num_tokens, table_width, key_begin, key_end, split, first_part, GROUP: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIBI: tl.constexpr,
    PARTIAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of tokens, all query heads of one key head, over the `split` keys from key_begin + split * part on."""
    first = tl.load(tiles + 4 * tl.program_id(0))
    count = tl.load(tiles + 4 * tl.program_id(0) + 1)
    sequence = tl.load(tiles + 4 * tl.program_id(0) + 2).to(tl.int64)
    if count == 0:
        return
    kv_head, part = tl.program_id(1), tl.program_id(2)
    index, keys, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    head = kv_head * GROUP + index % GROUP
    mask = index // GROUP < count
    row = (first + index // GROUP).to(tl.int64)
    position = tl.load(positions + row, mask=mask, other=-1)
    query_at = (row * query_stride + head * K)[:, None] + columns[None, :]
    q = load_tile(query, query_at, mask, columns, K, BLOCK_K == K)  # [BLOCK, BLOCK_K]
    if ALIBI:
        slope = tl.load(slopes + head, mask=mask, other=0.0) * 1.4426950408889634  # log2(e)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    begin = key_begin + part * split
    end = tl.minimum(tl.minimum(begin + split, key_end), tl.max(position, 0) + 1)
    part_start = (first_part + part).to(tl.int64) * num_tokens
    if PARTIAL:  # noqa: SIM102 - known at compile time, unlike the next condition
        if begin >= end:  # a part after the end of the context: its output is never read
            no_weight = tl.full([BLOCK], float("-inf"), tl.float32)
            tl.store(lse + (part_start + row) * num_heads + head, no_weight, mask=mask)
            return
    heads_kv = kv_cache + kv_head * B * K
    num_kv_heads = num_heads // GROUP
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = start + keys
        key_mask = key < end
        block = tl.load(block_table + sequence * table_width + key // B, mask=key_mask, other=0).to(tl.int64)
        at = (block * block_stride + key % B * K)[:, None] + columns[None, :]
        k = load_tile(heads_kv, at, key_mask, columns, K, BLOCK_K == K)  # [BLOCK_N, BLOCK_K]
        v = load_tile(heads_kv + num_kv_heads * B * K, at, key_mask, columns, K, BLOCK_K == K)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # in log2
        distance = key[None, :] - position[:, None]
        if ALIBI:
            scores += slope[:, None] * distance.to(tl.float32)
        scores = tl.where((distance <= 0) & key_mask[None, :], scores, float("-inf"))
        top, total, o = online_softmax(scores, v, top, total, o)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    o = o / total[:, None]
    if PARTIAL:
        row += part_start
        tl.store(lse + row * num_heads + head, tl.where(empty, float("-inf"), top + tl.log2(total)), mask=mask)
    out_at = (row * num_heads + head)[:, None] * K + columns[None, :]
    store_tile(out, out_at, o, mask, columns, K, BLOCK_K == K)


@jit_runtime("num_parts", "num_tokens")
def _merge_parts(
    parts, lse, out, num_parts, num_tokens, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token: the sum of the parts of its context in order, each weighted by its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    heads, columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    mask = heads < H
    at = heads[:, None] * K + columns[None, :]
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    for part in range(0, num_parts):
        part_lse = tl.load(lse + (part * num_tokens + row) * H + heads, mask=mask, other=float("-inf"))
        top = tl.maximum(top, part_lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    for part in range(0, num_parts):
        part_row = (part * num_tokens + row) * H
        weight = tl.exp2(tl.load(lse + part_row + heads, mask=mask, other=float("-inf")) - top)
        total += weight
        o += weight[:, None] * load_tile(parts + part_row * K, at, weight > 0.0, columns, K, BLOCK_K == K)
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    store_tile(out + row * H * K, at, o, mask, columns, K, BLOCK_K == K)


def paged_plan(
    query_starts: Tensor,
    context_lengths: Tensor,
    num_tokens: int,
    *,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    shared: bool = False,
) -> Plan:
    """Build the plan for Triton; `group` is the number of query heads per key head.

    Rows after the last of query_starts are padding and give zeros. Raises `ValueError` if a group does not fit into a tile.
    """
    num_sequences = len(context_lengths)
    decode = num_tokens == num_sequences
    launch = launch_config("paged_decode" if decode else "paged_prefill", head_dim, dtype)
    if group > launch.block:
        raise ValueError(f"{group} query heads per key head do not fit into a tile of {launch.block} rows")
    rows = torch.arange(num_tokens, device=query_starts.device)
    sequence = torch.searchsorted(query_starts[1:].long(), rows, right=True)
    real = sequence < num_sequences
    of_row = sequence.clamp(max=num_sequences - 1)
    positions = (context_lengths[of_row] - query_starts[of_row + 1] + rows).where(real, -1)
    tiles = tile_records(sequence.where(real, -1), launch.block // group)
    shared_tiles = tile_records(torch.zeros_like(rows), launch.block // group) if shared else None
    return Plan(positions.to(torch.int32), tiles, shared_tiles, launch, SPLIT if decode else WHOLE)


def plan_step(
    kv_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    num_tokens: int,
    num_heads: int,
    alibi_slopes: Tensor | None,
    num_shared_blocks: int,
    spans: Spans | None = None,
) -> Plan | GatherPlan:
    """Return the plan that all layers of a step share, for their backend; `kv_cache` [N, 2, G, B, K] is any layer's."""
    num_kv_heads, head_dim = kv_cache.shape[2], kv_cache.shape[4]
    if use_triton(kv_cache):
        if spans is not None:
            raise ValueError("the Triton kernel does not read contexts of several spans")
        return paged_plan(
            query_starts, context_lengths, num_tokens,
            group=num_heads // num_kv_heads, head_dim=head_dim, dtype=kv_cache.dtype, shared=num_shared_blocks > 0,
        )  # fmt: skip
    return gather_plan(
        kv_cache, block_table, query_starts, context_lengths, num_heads=num_heads, alibi_slopes=alibi_slopes,
        spans=spans,
    )  # fmt: skip


def _launch(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    scale: float,
    slopes: Tensor | None,
    num_shared_blocks: int,
    plan: Plan,
) -> Tensor:
    num_tokens, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    shared, longest = num_shared_blocks * block_size, block_table.shape[1] * block_size
    shared_parts, own_parts = triton.cdiv(shared, plan.split), max(1, triton.cdiv(longest - shared, plan.split))
    num_parts = shared_parts + own_parts
    if shared and plan.shared_tiles is None:
        raise ValueError(f"num_shared_blocks is {num_shared_blocks}, but the plan was built for none")
    out = query.new_empty(query.shape)
    target, lse = out, None
    if num_parts > 1:
        target = query.new_empty(num_parts, *query.shape, dtype=torch.float32)
        lse = query.new_empty(target.shape[:3], dtype=torch.float32)
    sizes = {
        "GROUP": num_heads // num_kv_heads,
        "B": block_size,
        "K": head_dim,
        "BLOCK": plan.launch.block,
        "BLOCK_N": 64,
        "BLOCK_K": block_width(head_dim),
        "ALIBI": slopes is not None,
        "PARTIAL": num_parts > 1,
        "STAGES": plan.launch.num_stages,
    }
    for tiles, first_part, parts, begin, end in (
        (plan.shared_tiles, 0, shared_parts, 0, shared),
        (plan.tiles, shared_parts, own_parts, shared, longest),
    ):
        if tiles is not None and parts:
            _attend_blocks[(len(tiles), num_kv_heads, parts)](
                query, kv_cache, block_table, tiles, plan.positions, slopes, target, lse, scale * LOG2_E,
                query.stride(0), kv_cache.stride(0), num_heads, num_tokens, block_table.stride(0), begin, end,
                plan.split, first_part, **sizes, **plan.launch.options,
            )  # fmt: skip
    if lse is not None:
        _merge_parts[(num_tokens, triton.cdiv(num_heads, 8))](
            target, lse, out, num_parts, num_tokens, H=num_heads, K=head_dim,
            BLOCK_H=8, BLOCK_K=sizes["BLOCK_K"],
            **launch_config("row", head_dim, query.dtype).options,
        )  # fmt: skip
    return out


def _check_cache(kv_cache: Tensor) -> None:
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    inner = (num_kv_heads * block_size * head_dim, block_size * head_dim, head_dim, 1)
    if kv_cache.stride()[1:] != inner:
        raise ValueError(f"kv_cache has strides {kv_cache.stride()[1:]} within a block, the kernel requires {inner}")
    if block_size & (block_size - 1):
        raise ValueError(f"kv_cache has a block size of {block_size}, the kernel requires a power of two")


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    num_shared_blocks: int = 0,
    spans: Spans | None = None,
    plan: Plan | GatherPlan | None = None,
) -> Tensor:
    """Attend from the last tokens of each sequence to its blocks: query [T, H, K] -> [T, H, K].

    kv_cache [N, 2, G, B, K]; block_table [S, W]; query_starts [S + 1]; context_lengths [S], the slots of each
    row up to its last query. `spans` says which keys are in the slots, if a row is not one run of tokens. `plan` comes from
    `plan_step`.

    Raises `ValueError` for a cache in a layout that the kernel cannot read.
    """
    if use_triton(query):
        query = with_whole_heads(query)
        _check_cache(kv_cache)
    if plan is None:
        plan = plan_step(
            kv_cache, block_table, query_starts, context_lengths,
            num_tokens=len(query), num_heads=query.shape[1], alibi_slopes=alibi_slopes,
            num_shared_blocks=num_shared_blocks, spans=spans,
        )  # fmt: skip
    if isinstance(plan, GatherPlan):
        return attend(query, kv_cache, plan, scale)
    shared = num_shared_blocks if len(context_lengths) > 1 else 0
    return _launch(query, kv_cache, block_table, scale, alibi_slopes, shared, plan)
