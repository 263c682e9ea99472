"""Paged attention as a processor serves it: all decoding sequences in one batch, the others one by one.

What all of a step's layers share (which blocks, which mask) is worked out once, in a `GatherPlan`. Blocks that every
decoding sequence has in front (a support set) are read once, for all of them together; where there is little to read, a
compiled loop goes through each sequence's own blocks, and gathers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_attention import alibi_bias
from kernels.decode_rows import DecodeRows, attend_each, decode_rows

# query heads times keys of a step's decoding rows, up to which a loop on one thread beats gathering for a product on two
MOST_SCORES = 1 << 14
# keys and values of one layer, from which on the copy alone takes longer than the loop
MOST_GATHERED_BYTES = 24 << 20


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Sequences with one query each: rows [S], blocks they share [W], their own [S * W'], and what is added to scores."""

    rows: Tensor
    shared: Tensor
    own: Tensor
    beyond: Tensor  # places in the gathered own tokens [S * C'] that no sequence has filled: they may hold anything
    mask: Tensor  # float32 [1, S, 1, C], with ALiBi [G, S, H / G, C]


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

    def only_decodes(self, num_tokens: int) -> DecodeRows | None:
        """The rows, where each of so many is one that the compiled loop serves."""
        all_decode = isinstance(self.decode, DecodeRows) and len(self.decode.rows) == num_tokens
        return self.decode if all_decode and isinstance(self.decode, DecodeRows) else None


def gather_plan(
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    block_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    alibi_slopes: Tensor | None = None,
    num_heads: int = 0,
    block_bytes: int = 0,
) -> GatherPlan:
    """`num_heads` and `block_bytes`, one layer's: given where the compiled loop may serve."""
    starts, contexts = query_starts.tolist(), context_lengths.tolist()
    rows = [(i, first, end) for i, (first, end) in enumerate(pairwise(starts)) if end > first]
    decoding = [i for i, first, end in rows if end == first + 1]
    is_little = sum(contexts[i] for i in decoding) * num_heads <= MOST_SCORES
    gathered = None
    if not (num_heads and is_little):
        gathered = _decode_plan(block_table, starts, contexts, decoding, block_size, num_kv_heads, alibi_slopes)
    is_much = gathered is not None and len(gathered.own) * block_bytes >= MOST_GATHERED_BYTES
    decode: DecodePlan | DecodeRows | None = gathered
    if num_heads and (is_little or is_much):
        decode = decode_rows(block_table, query_starts, context_lengths, decoding, alibi_slopes)
    spans = [
        _span_plan(first, end, block_table[i], contexts[i], block_size, dtype, alibi_slopes)
        for i, first, end in rows
        if end > first + 1
    ]
    return GatherPlan(decode, spans)


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
        attend_each(query, kv_cache, plan.decode, scale, out)
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
