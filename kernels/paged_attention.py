"""Causal self-attention over the blocks of the K/V cache: prefill and decode of any mix of sequences.

A context is one run of tokens, or spans that were computed independently of each other. Blocks that several rows have in
the same place (a support set) are read once for all of them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.paged_attention_cpu import GatherPlan, attend, gather_blocks, gather_plan
from kernels.paged_attention_gpu import attend_tiles
from kernels.paged_plan import TilePlan, TileShape, plan_tiles
from kernels.spans import Spans
from kernels.tiles import with_whole_heads


def paged_attention_reference(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    spans: Spans | None = None,
    plan: TilePlan | GatherPlan | None = None,
) -> Tensor:
    """The specification: a key is read if and only if it is valid and its position is at most the query's.

    Keys with an offset are rotated by it.
    """
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
        kv = gather_blocks(kv_cache, block_table[row, :width]).float()
        offsets = None if spans is None else spans.offsets
        rotation = None if offsets is None else offsets.rotation(offsets.blocks[row, :width])
        if rotation is not None:
            rotation.apply_(kv[0].unflatten(1, (width, -1)))
        key, value = kv[:, :, :context][:, :, is_valid].repeat_interleave(group, 1)  # [H, C, K] each
        distance = keys[is_valid] - positions[:, None]  # [Q, C]
        scores = torch.einsum("qhk,hck->hqc", query[first:end].float(), key) * scale
        scores = (scores + slopes[:, None, None] * distance).masked_fill(distance > 0, float("-inf"))
        outputs.append(torch.einsum("hqc,hck->qhk", scores.softmax(-1), value))
    return torch.cat(outputs).to(query.dtype)


def plan_step(
    kv_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    num_tokens: int,
    num_heads: int,
    alibi_slopes: Tensor | None,
    spans: Spans | None = None,
) -> TilePlan | GatherPlan:
    """Return the plan that all layers of a step share, for their backend; `kv_cache` [N, 2, G, B, K] is any layer's.

    Tables on a GPU are copied to the host, which waits for them. So a server builds the plan from tables in host memory.
    """
    if not use_triton(kv_cache):
        return gather_plan(
            kv_cache, block_table, query_starts, context_lengths, num_heads=num_heads, alibi_slopes=alibi_slopes,
            spans=spans,
        )  # fmt: skip
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    tables = (table.cpu() for table in (block_table, query_starts, context_lengths))
    has_offsets = spans is not None and spans.offsets is not None
    shape = TileShape(block_size, num_heads // num_kv_heads, head_dim, kv_cache.dtype, has_offsets)
    plan = plan_tiles(*tables, num_tokens=num_tokens, shape=shape, spans=None if spans is None else spans.to("cpu"))
    return plan.to(kv_cache.device).over(block_table, block_size, spans)


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
    spans: Spans | None = None,
    plan: TilePlan | GatherPlan | None = None,
) -> Tensor:
    """Attend from the last tokens of each sequence to its blocks: query [T, H, K] -> [T, H, K].

    kv_cache [N, 2, G, B, K]; block_table [S, W]; query_starts [S + 1]; context_lengths [S], the slots of each row up to its
    last query. `spans` has the keys in the slots, if a row is not one run of tokens. `plan` comes from `plan_step`.

    Raises `ValueError` for a cache in a layout that the kernel cannot read.
    """
    if use_triton(query):
        query = with_whole_heads(query)
        _check_cache(kv_cache)
    if plan is None:
        plan = plan_step(
            kv_cache, block_table, query_starts, context_lengths,
            num_tokens=len(query), num_heads=query.shape[1], alibi_slopes=alibi_slopes, spans=spans,
        )  # fmt: skip
    if isinstance(plan, GatherPlan):
        return attend(query, kv_cache, plan, scale)
    return attend_tiles(query, kv_cache, block_table, plan, scale, alibi_slopes)
