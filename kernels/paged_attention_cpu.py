"""Paged attention on a CPU: decoding sequences in one batch or in a compiled loop, all other sequences one by one.

A `GatherPlan` holds what all layers of a step share (blocks, masks). Blocks that every decoding sequence has in the same
place (a support set) are read once for all of them. Where there is little to read, a compiled loop goes through each
sequence's own blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_compiled
from kernels.paged_attention_loop import DecodeRows, attend_in_loop
from kernels.self_attention import alibi_bias, is_contiguous_in_blocks
from kernels.spans import Spans

# query heads times keys of all decoding rows, up to which a loop on one thread beats gathering for a product on two
MAX_LOOP_SCORES = 1 << 14
# keys and values of one layer, from which on the copy alone takes longer than the loop
MAX_GATHERED_BYTES = 24 << 20


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Sequences with one query each, whose keys and values are gathered for a product."""

    rows: Tensor  # [S]
    shared: Tensor  # [W], the blocks that all sequences have in the same place
    shared_unfilled: Tensor | None  # indices among their slots [C] of those without a valid key, if there are any
    unshared: Tensor  # [S * W'], the other blocks of each
    unfilled: Tensor  # indices among the slots of all unshared blocks [S * C'] of those that hold no key for their row
    mask: Tensor  # float32 [1, S, 1, C + C'], with ALiBi [G, S, H / G, C + C'], added to the scores


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """The queries of one sequence, rows first .. end."""

    first: int
    end: int
    blocks: Tensor
    num_slots: int
    mask: Tensor | None  # None: causal from the start of the sequence
    is_causal: bool
    unfilled: Tensor | None = None  # indices of slots without a valid key, if there may be any


@dataclass(frozen=True, slots=True)
class GatherPlan:
    decode: DecodePlan | DecodeRows | None
    pieces: list[PiecePlan]

    def only_decodes(self, num_tokens: int) -> DecodeRows | None:
        """Return the rows if all `num_tokens` of the step are served by the compiled loop."""
        decode = self.decode
        return decode if isinstance(decode, DecodeRows) and len(decode.rows) == num_tokens else None


class _Step(NamedTuple):
    kv_cache: Tensor
    block_table: Tensor
    query_starts: Tensor
    starts: list[int]
    context_lengths: Tensor
    contexts: list[int]
    alibi_slopes: Tensor | None
    spans: Spans | None


def gather_plan(
    kv_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    num_heads: int,
    alibi_slopes: Tensor | None = None,
    spans: Spans | None = None,
) -> GatherPlan:
    """Build the plan for all layers; `kv_cache` [N, 2, G, B, K] is any layer's, `num_heads` counts query heads."""
    starts, contexts = query_starts.tolist(), context_lengths.tolist()
    step = _Step(kv_cache, block_table, query_starts, starts, context_lengths, contexts, alibi_slopes, spans)
    rows = [(i, first, end) for i, (first, end) in enumerate(pairwise(starts)) if end > first]
    decoding = [i for i, first, end in rows if end == first + 1]
    may_loop = use_compiled(kv_cache[:0]) and is_contiguous_in_blocks(kv_cache)
    loops = may_loop and sum(contexts[i] for i in decoding) * num_heads <= MAX_LOOP_SCORES
    decode: DecodePlan | DecodeRows | None = None
    if decoding and not loops:
        decode = _decode_plan(step, decoding)
        loops = may_loop and len(decode.unshared) * kv_cache[:1].nbytes >= MAX_GATHERED_BYTES
    if decoding and loops:
        decode = _decode_rows(step, decoding)
    plan_piece = _plan_piece if spans is None else _plan_piece_of_spans
    return GatherPlan(decode, [plan_piece(step, i, first, end) for i, first, end in rows if end > first + 1])


def _decode_plan(step: _Step, sequences: Sequence[int]) -> DecodePlan:
    block_size, slopes = step.kv_cache.shape[3], step.alibi_slopes
    contexts = [step.contexts[i] for i in sequences]
    width, rows = -(-max(contexts) // block_size), torch.tensor([step.starts[i] for i in sequences])
    tables = step.block_table[sequences, :width]
    spans = None if step.spans is None else step.spans.select(rows, sequences)
    if spans is None:
        is_shared = _equal_columns(tables)
        is_shared[(min(contexts) - 1) // block_size :] = False
    else:
        is_shared = _equal_columns(tables, spans.block_positions[:, :width], spans.block_lengths[:, :width])
    num_shared = int(is_shared.sum())
    columns = torch.cat([is_shared.nonzero()[:, 0], (~is_shared).nonzero()[:, 0]]) if num_shared else None
    tables = tables if columns is None else tables[:, columns]
    distance, is_empty = _distances(contexts, width if columns is None else columns, block_size, spans)
    is_hidden = distance > 0 if is_empty is None else is_empty | (distance > 0)  # [S, C + C']
    num_slots = num_shared * block_size
    shared_unfilled = None
    if is_empty is not None and bool(is_empty[0, :num_slots].any()):
        shared_unfilled = is_empty[0, :num_slots].nonzero()[:, 0]
    return DecodePlan(
        rows,
        tables[0, :num_shared],
        shared_unfilled,
        tables[:, num_shared:].flatten().clamp(min=0),
        is_hidden[:, num_slots:].flatten().nonzero()[:, 0],
        _decode_mask(distance, is_hidden, slopes, step.kv_cache.shape[2]),
    )


def _equal_columns(*tables: Tensor) -> Tensor:
    """Return which columns [W] are the same in every row of all tables [S, W]; a single row shares none."""
    if len(tables[0]) == 1:
        return torch.zeros(tables[0].shape[1], dtype=torch.bool)
    equal = (tables[0] == tables[0][:1]).all(0)
    for table in tables[1:]:
        equal &= (table == table[:1]).all(0)
    return equal


def _distances(
    contexts: list[int], columns: Tensor | int, block_size: int, spans: Spans | None
) -> tuple[Tensor, Tensor | None]:
    """Return each row's distances from its query to the keys in these columns (all of a number), and which are no keys.

    Both are [S, C]. In plain sequences, every slot up to the query's holds a key.
    """
    if spans is None:
        blocks = torch.arange(columns) if isinstance(columns, int) else columns
        keys = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
        return keys - (torch.tensor(contexts)[:, None] - 1), None
    order = slice(columns) if isinstance(columns, int) else columns
    keys, is_empty = spans.keys(order, block_size)
    return keys - spans.positions[:, None], is_empty


def _decode_mask(distance: Tensor, is_hidden: Tensor, slopes: Tensor | None, num_kv_heads: int) -> Tensor:
    mask = torch.zeros(distance.shape) if slopes is None else slopes.float()[:, None, None] * distance
    mask = mask.masked_fill(is_hidden, float("-inf"))
    if slopes is None:
        return mask[None, :, None]
    return mask.unflatten(0, (num_kv_heads, -1)).transpose(1, 2).contiguous()


def _decode_rows(step: _Step, sequences: Sequence[int]) -> DecodeRows:
    spans, inputs = step.spans, (step.query_starts[:-1], step.block_table, step.context_lengths)
    rows, tables, lengths = (x.to(torch.int32) for x in inputs)
    if len(sequences) < len(lengths):
        rows, tables, lengths = (x[sequences] for x in (rows, tables, lengths))
    if spans is not None:
        spans = spans.select(rows.long(), sequences)
    slopes = None if step.alibi_slopes is None else step.alibi_slopes.float()
    return DecodeRows(rows, tables.contiguous(), lengths.contiguous(), slopes, spans)


def _plan_piece(step: _Step, row: int, first: int, end: int) -> PiecePlan:
    context, block_size, slopes = step.contexts[row], step.kv_cache.shape[3], step.alibi_slopes
    num_queries, mask = end - first, None
    is_whole = num_queries == context and slopes is None
    if slopes is not None:
        mask = alibi_bias(slopes, num_queries, context).to(step.kv_cache.dtype)
    elif not is_whole:
        mask = torch.ones(num_queries, context, dtype=torch.bool).tril(context - num_queries)
    return PiecePlan(first, end, step.block_table[row, : -(-context // block_size)], context, mask, is_whole)


def _plan_piece_of_spans(step: _Step, row: int, first: int, end: int) -> PiecePlan:
    assert step.spans is not None
    context, block_size, slopes = step.contexts[row], step.kv_cache.shape[3], step.alibi_slopes
    width = -(-context // block_size)
    keys, is_empty = (
        x[0, :context] for x in step.spans.select(slice(first, end), [row]).keys(slice(width), block_size)
    )
    distance = keys - step.spans.positions[first:end, None]  # [Q, C]
    is_hidden = is_empty | (distance > 0)
    mask = ~is_hidden
    if slopes is not None:
        bias = slopes.float()[:, None, None] * distance
        mask = bias.masked_fill(is_hidden, float("-inf")).to(step.kv_cache.dtype)
    return PiecePlan(first, end, step.block_table[row, :width], context, mask, False, is_empty.nonzero()[:, 0])


def attend(query: Tensor, kv_cache: Tensor, plan: GatherPlan, scale: float) -> Tensor:
    """Attend to the cache [N, 2, G, B, K]: query [T, H, K] -> [T, H, K]."""
    if plan.decode is None and len(plan.pieces) == 1:
        return _attend_piece(query, kv_cache, plan.pieces[0], scale)
    if isinstance(plan.decode, DecodePlan) and len(plan.decode.rows) == len(query):
        return _attend_gathered(query, kv_cache, plan.decode, scale)
    out = query.new_empty(query.shape)
    for piece in plan.pieces:
        out[piece.first : piece.end] = _attend_piece(query[piece.first : piece.end], kv_cache, piece, scale)
    if isinstance(plan.decode, DecodeRows):
        attend_in_loop(query, kv_cache, plan.decode, scale, out)
    elif plan.decode is not None:
        out[plan.decode.rows] = _attend_gathered(query[plan.decode.rows], kv_cache, plan.decode, scale)
    return out


def gather_blocks(kv_cache: Tensor, blocks: Tensor) -> Tensor:
    """Copy the keys and values of these blocks: [2, G, len(blocks) * B, K]."""
    return kv_cache.permute(1, 2, 0, 3, 4).index_select(2, blocks).flatten(2, 3)


def _attend_piece(query: Tensor, kv_cache: Tensor, piece: PiecePlan, scale: float) -> Tensor:
    kv = gather_blocks(kv_cache, piece.blocks)[:, :, : piece.num_slots]
    if piece.unfilled is not None:
        kv.index_fill_(2, piece.unfilled, 0)
    key, value = kv[:, None]
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, piece.mask, is_causal=piece.is_causal, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _attend_gathered(query: Tensor, kv_cache: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """One softmax over shared and unshared keys, one query per sequence: [S, H, K] -> [S, H, K]."""
    num_sequences, _, head_dim = query.shape
    num_kv_heads = kv_cache.shape[2]
    grouped = query.view(num_sequences, num_kv_heads, -1, head_dim).transpose(0, 1)  # [G, S, H / G, K]
    unshared = gather_blocks(kv_cache, plan.unshared).index_fill_(2, plan.unfilled, 0)
    unshared_key, unshared_value = unshared.unflatten(2, (num_sequences, -1))  # [G, S, C', K]
    scores = grouped @ unshared_key.transpose(2, 3)
    if not len(plan.shared):
        out = torch.add(plan.mask, scores, alpha=scale).softmax(-1).to(query.dtype) @ unshared_value
        return out.transpose(0, 1).reshape(query.shape)
    flat = grouped.reshape(num_kv_heads, -1, head_dim)
    shared = gather_blocks(kv_cache, plan.shared)
    if plan.shared_unfilled is not None:
        shared.index_fill_(2, plan.shared_unfilled, 0)
    shared_key, shared_value = shared  # [G, C, K]
    shared_scores = (flat @ shared_key.transpose(1, 2)).view(*grouped.shape[:3], -1)
    scores = torch.cat([shared_scores, scores], dim=-1)
    weights = torch.add(plan.mask, scores, alpha=scale).softmax(-1).to(query.dtype)
    shared_weights, unshared_weights = weights.split([shared_key.shape[1], unshared_key.shape[2]], dim=-1)
    shared_out = (shared_weights.reshape(*flat.shape[:2], -1) @ shared_value).view(grouped.shape)
    return (unshared_weights @ unshared_value + shared_out).transpose(0, 1).reshape(query.shape)
