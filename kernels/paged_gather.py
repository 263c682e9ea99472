# mypy: disable-error-code="no-untyped-def"
"""Paged attention as a processor serves it: all decoding sequences in one batch, the others one by one.

What all of a step's layers share (which blocks, which mask) is worked out once, in a `GatherPlan`. Blocks that every
decoding sequence has in front (a support set) are read once, for all of them together; where there is little to read, a
compiled loop goes through each sequence's own blocks, and gathers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_attention import alibi_bias
from kernels.compiled import compiled, exp, inlined, load, store

# query heads times keys of a step's decoding rows, up to which a loop on one thread beats gathering for a product
MOST_SCORES = 1 << 15


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Sequences with one query each: rows [S], blocks they share [W], their own [S * W'], and what is added to scores."""

    rows: Tensor
    shared: Tensor
    own: Tensor
    beyond: Tensor  # places in the gathered own tokens [S * C'] that no sequence has filled: they may hold anything
    mask: Tensor  # float32 [1, S, 1, C], with ALiBi [G, S, H / G, C]


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The same for the compiled loop: rows [S], block tables [S, W], context lengths [S], all int32; slopes [H] float32."""

    rows: Tensor
    tables: Tensor
    lengths: Tensor
    slopes: Tensor | None


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """One sequence's queries, rows first .. end: its blocks, tokens of context, and mask; None: causal from its start."""

    first: int
    end: int
    blocks: Tensor
    context: int
    mask: Tensor | None
    is_causal: bool


@dataclass(frozen=True, slots=True)
class GatherPlan:
    decode: DecodePlan | DecodeRows | None
    spans: list[SpanPlan]


def gather_plan(
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    block_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    alibi_slopes: Tensor | None = None,
    num_heads: int | None = None,
) -> GatherPlan:
    """`num_heads`: given where the compiled loop may serve."""
    starts, contexts = query_starts.tolist(), context_lengths.tolist()
    rows = [(i, first, end) for i, (first, end) in enumerate(pairwise(starts)) if end > first]
    decoding = [i for i, first, end in rows if end == first + 1]
    decode: DecodePlan | DecodeRows | None
    if num_heads and sum(contexts[i] for i in decoding) * num_heads <= MOST_SCORES:
        decode = _decode_rows(block_table, query_starts, context_lengths, decoding, alibi_slopes)
    else:
        decode = _decode_plan(block_table, starts, contexts, decoding, block_size, num_kv_heads, alibi_slopes)
    spans = [
        _span_plan(first, end, block_table[i], contexts[i], block_size, dtype, alibi_slopes)
        for i, first, end in rows
        if end > first + 1
    ]
    return GatherPlan(decode, spans)


def _decode_rows(
    block_table: Tensor, query_starts: Tensor, context_lengths: Tensor, sequences: list[int], slopes: Tensor | None
) -> DecodeRows | None:
    if not sequences:
        return None
    rows, tables, lengths = (x.to(torch.int32)[sequences] for x in (query_starts, block_table, context_lengths))
    return DecodeRows(rows, tables.contiguous(), lengths, None if slopes is None else slopes.float())


def _decode_plan(
    block_table: Tensor,
    starts: list[int],
    contexts: list[int],
    sequences: Sequence[int],
    block_size: int,
    num_kv_heads: int,
    alibi_slopes: Tensor | None,
) -> DecodePlan | None:
    if not sequences:
        return None
    tables, lengths = block_table[sequences], torch.tensor([contexts[i] for i in sequences])
    width = -(-int(lengths.max()) // block_size)
    num_shared = _common_blocks(tables[:, : int(lengths.min() - 1) // block_size])
    places = torch.arange(width * block_size)
    distance = places - (lengths[:, None] - 1)  # [S, C]
    ahead = distance > 0
    mask = torch.zeros(ahead.shape) if alibi_slopes is None else alibi_slopes.float()[:, None, None] * distance
    mask = mask.masked_fill(ahead, float("-inf"))
    if alibi_slopes is None:
        mask = mask[None, :, None]
    else:
        mask = mask.unflatten(0, (num_kv_heads, -1)).transpose(1, 2).contiguous()
    own = tables[:, num_shared:width].flatten().clamp(min=0)
    beyond = ahead[:, num_shared * block_size :].flatten().nonzero()[:, 0]
    return DecodePlan(torch.tensor([starts[i] for i in sequences]), tables[0, :num_shared], own, beyond, mask)


def _common_blocks(tables: Tensor) -> int:
    """How many blocks in front are the same in every row; a single row shares nothing."""
    if len(tables) == 1:
        return 0
    same = (tables == tables[:1]).all(0)
    return int(same.long().cumprod(0).sum())


def _span_plan(
    first: int,
    end: int,
    blocks: Tensor,
    context: int,
    block_size: int,
    dtype: torch.dtype,
    alibi_slopes: Tensor | None,
) -> SpanPlan:
    num_queries, mask = end - first, None
    whole = num_queries == context and alibi_slopes is None
    if alibi_slopes is not None:
        mask = alibi_bias(alibi_slopes, num_queries, context).to(dtype)
    elif num_queries > 1 and not whole:
        mask = torch.ones(num_queries, context, dtype=torch.bool).tril(context - num_queries)
    return SpanPlan(first, end, blocks[: -(-context // block_size)], context, mask, whole)


def attend(query: Tensor, kv_cache: Tensor, plan: GatherPlan, scale: float) -> Tensor:
    """query [T, H, K], kv_cache [N, 2, G, B, K] -> [T, H, K]"""
    if plan.decode is None and len(plan.spans) == 1:
        return _attend_span(query, kv_cache, plan.spans[0], scale)
    if isinstance(plan.decode, DecodePlan) and len(plan.decode.rows) == len(query):
        return _attend_together(query, kv_cache, plan.decode, scale)
    out = query.new_empty(query.shape)
    for span in plan.spans:
        out[span.first : span.end] = _attend_span(query[span.first : span.end], kv_cache, span, scale)
    if isinstance(plan.decode, DecodeRows):
        _attend_each(query, kv_cache, plan.decode, scale, out)
    elif plan.decode is not None:
        out[plan.decode.rows] = _attend_together(query[plan.decode.rows], kv_cache, plan.decode, scale)
    return out


def gather_blocks(kv_cache: Tensor, blocks: Tensor) -> Tensor:
    """Keys and values of these blocks in one copy: [2, G, len(blocks) * B, K]"""
    return kv_cache.permute(1, 2, 0, 3, 4).index_select(2, blocks).flatten(2, 3)


def _attend_span(query: Tensor, kv_cache: Tensor, span: SpanPlan, scale: float) -> Tensor:
    key, value = gather_blocks(kv_cache, span.blocks)[:, None, :, : span.context]
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, span.mask, is_causal=span.is_causal, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _attend_together(query: Tensor, kv_cache: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """One softmax over shared and own keys, one query a sequence: [S, H, K] -> [S, H, K]"""
    num_sequences, _, head_dim = query.shape
    num_kv_heads = kv_cache.shape[2]
    grouped = query.view(num_sequences, num_kv_heads, -1, head_dim).transpose(0, 1)  # [G, S, H / G, K]
    own = gather_blocks(kv_cache, plan.own).index_fill_(2, plan.beyond, 0)
    own_key, own_value = own.unflatten(2, (num_sequences, -1))  # [G, S, C', K]
    scores = grouped @ own_key.transpose(2, 3)
    if not len(plan.shared):
        out = torch.add(plan.mask, scores, alpha=scale).softmax(-1).to(query.dtype) @ own_value
        return out.transpose(0, 1).reshape(query.shape)
    flat = grouped.reshape(num_kv_heads, -1, head_dim)
    shared_key, shared_value = gather_blocks(kv_cache, plan.shared)  # [G, C, K]
    shared_scores = (flat @ shared_key.transpose(1, 2)).view(*grouped.shape[:3], -1)
    scores = torch.cat([shared_scores, scores], dim=-1)
    weights = torch.add(plan.mask, scores, alpha=scale).softmax(-1).to(query.dtype)
    shared_weights, own_weights = weights.split([shared_key.shape[1], own_key.shape[2]], dim=-1)
    out = own_weights @ own_value + (shared_weights.reshape(*flat.shape[:2], -1) @ shared_value).view(grouped.shape)
    return out.transpose(0, 1).reshape(query.shape)


@compiled("T* T* T* int32* int32* int32* float32* float int int int int int int int int int")
def _decode_rows_of_heads(
    query,
    kv_cache,
    out,
    rows,
    tables,
    lengths,
    slopes,
    scale,
    has_slopes,
    num_sequences,
    num_heads,
    num_kv_heads,
    head_dim,
    block_size,
    table_width,
    query_stride,
    block_stride,
):
    """One row after the other; the query heads of one key head together, so that a key is read once for all of them."""
    group = num_heads // num_kv_heads
    longest = 0
    for sequence in range(num_sequences):
        longest = max(longest, lengths[sequence])
    q, o = np.empty(group * head_dim, np.float32), np.empty(group * head_dim, np.float32)
    weights = np.empty(group * longest, np.float32)
    for sequence in range(num_sequences):
        row, length, table = rows[sequence], lengths[sequence], sequence * table_width
        for kv_head in range(num_kv_heads):
            first_head = kv_head * group
            for i in range(group * head_dim):
                q[i] = load(query, row * query_stride + first_head * head_dim + i) * scale
                o[i] = np.float32(0)
            for key in range(length):
                block = tables[table + key // block_size] * block_stride
                at = block + (kv_head * block_size + key % block_size) * head_dim
                for head in range(group):
                    score = np.float32(0)
                    for i in range(head_dim):
                        score += q[head * head_dim + i] * load(kv_cache, at + i)
                    if has_slopes:
                        score += slopes[first_head + head] * np.float32(key - (length - 1))
                    weights[head * longest + key] = score
            for head in range(group):
                _softmax(weights, head * longest, length)
            for key in range(length):
                block = tables[table + key // block_size] * block_stride
                at = block + ((num_kv_heads + kv_head) * block_size + key % block_size) * head_dim
                for head in range(group):
                    weight = weights[head * longest + key]
                    for i in range(head_dim):
                        o[head * head_dim + i] += weight * load(kv_cache, at + i)
            for i in range(group * head_dim):
                store(out, (row * num_heads + first_head) * head_dim + i, o[i])


@inlined
def _softmax(x, first, length):
    top = x[first]
    for i in range(first, first + length):
        top = max(top, x[i])
    total = np.float32(0)
    for i in range(first, first + length):
        x[i] = exp(x[i] - top)
        total += x[i]
    for i in range(first, first + length):
        x[i] /= total


def _attend_each(query: Tensor, kv_cache: Tensor, plan: DecodeRows, scale: float, out: Tensor) -> None:
    """The rows of `plan` of query [T, H, K], into those of out [T, H, K]"""
    _, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    num_sequences, table_width = plan.tables.shape
    slopes = plan.slopes
    if query.stride()[1:] != (head_dim, 1):
        query = query.contiguous()
    _decode_rows_of_heads[query.dtype](
        query.data_ptr(), kv_cache.data_ptr(), out.data_ptr(), plan.rows.data_ptr(), plan.tables.data_ptr(),
        plan.lengths.data_ptr(), 0 if slopes is None else slopes.data_ptr(), scale, slopes is not None, num_sequences,
        num_heads, num_kv_heads, head_dim, block_size, table_width, query.stride(0), kv_cache.stride(0),
    )  # fmt: skip
