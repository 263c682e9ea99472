"""Paged attention on a CPU: decoding sequences in one batch or in a compiled loop, all other sequences one by one.

A `GatherPlan` holds what all layers of a step share (blocks, masks). Leading blocks that every decoding sequence has in
common (a support set) are read once for all of them. Where there is little to read, a compiled loop goes through each
sequence's own blocks: it copies and pads nothing, runs on one thread, and a row's sums are the same in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_compiled
from kernels.compiled import compiled_for, exp, inlined, length, load, store
from kernels.self_attention import alibi_bias, is_contiguous_in_blocks, kv_store, rotate_, rotate_heads, store_token
from kernels.spans import Spans
from kernels.tiles import with_whole_heads

# query heads times keys of all decoding rows, up to which a loop on one thread beats gathering for a product on two
MAX_LOOP_SCORES = 1 << 14
# keys and values of one layer, from which on the copy alone takes longer than the loop
MAX_GATHERED_BYTES = 24 << 20


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Sequences with one query each, whose keys and values are gathered for a product."""

    rows: Tensor  # [S]
    shared: Tensor  # [W], the leading blocks of all sequences
    unshared: Tensor  # [S * W'], the other blocks of each
    unfilled: Tensor  # indices among the gathered unshared tokens [S * C'] of those that no sequence has filled
    mask: Tensor  # float32 [1, S, 1, C], with ALiBi [G, S, H / G, C], added to the scores


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Sequences with one query each, for the compiled loop."""

    rows: Tensor  # [S] int32
    tables: Tensor  # [S, W] int32, blocks
    lengths: Tensor  # [S] int32, context lengths
    slopes: Tensor | None  # [H] float32


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """The queries of one sequence, rows first .. end."""

    first: int
    end: int
    blocks: Tensor
    context: int  # number of slots
    mask: Tensor | None  # None: causal from the start of the sequence
    is_causal: bool
    unfilled: Tensor | None = None  # indices of slots without a valid key


@dataclass(frozen=True, slots=True)
class GatherPlan:
    decode: DecodePlan | DecodeRows | None
    spans: list[SpanPlan]

    def only_decodes(self, num_tokens: int) -> DecodeRows | None:
        """Return the rows if all `num_tokens` of the step are served by the compiled loop."""
        decode = self.decode
        return decode if isinstance(decode, DecodeRows) and len(decode.rows) == num_tokens else None


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
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    starts, contexts = query_starts.tolist(), context_lengths.tolist()
    rows = [(i, first, end) for i, (first, end) in enumerate(pairwise(starts)) if end > first]
    if spans is not None:
        return GatherPlan(
            None,
            [
                _plan_of_spans(
                    i, first, end, block_table[i], contexts[i], block_size, kv_cache.dtype, alibi_slopes, spans
                )
                for i, first, end in rows
            ],
        )
    decoding = [i for i, first, end in rows if end == first + 1]
    may_loop = use_compiled(kv_cache[:0]) and is_contiguous_in_blocks(kv_cache)
    loops = may_loop and sum(contexts[i] for i in decoding) * num_heads <= MAX_LOOP_SCORES
    decode: DecodePlan | DecodeRows | None = None
    if decoding and not loops:
        decode = _decode_plan(block_table, starts, contexts, decoding, block_size, num_kv_heads, alibi_slopes)
        loops = may_loop and len(decode.unshared) * kv_cache[:1].nbytes >= MAX_GATHERED_BYTES
    if decoding and loops:
        decode = _decode_rows(block_table, query_starts, context_lengths, decoding, alibi_slopes)
    spans = [
        _span_plan(first, end, block_table[i], contexts[i], block_size, kv_cache.dtype, alibi_slopes)
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
) -> DecodePlan:
    tables, lengths = block_table[sequences], torch.tensor([contexts[i] for i in sequences])
    width = -(-int(lengths.max()) // block_size)
    num_shared = _num_common_blocks(tables[:, : int(lengths.min() - 1) // block_size])
    distance = torch.arange(width * block_size) - (lengths[:, None] - 1)  # [S, C]
    ahead = distance > 0
    mask = torch.zeros(ahead.shape) if alibi_slopes is None else alibi_slopes.float()[:, None, None] * distance
    mask = mask.masked_fill(ahead, float("-inf"))
    if alibi_slopes is None:
        mask = mask[None, :, None]
    else:
        mask = mask.unflatten(0, (num_kv_heads, -1)).transpose(1, 2).contiguous()
    unshared = tables[:, num_shared:width].flatten().clamp(min=0)
    unfilled = ahead[:, num_shared * block_size :].flatten().nonzero()[:, 0]
    return DecodePlan(torch.tensor([starts[i] for i in sequences]), tables[0, :num_shared], unshared, unfilled, mask)


def _num_common_blocks(tables: Tensor) -> int:
    """Return how many leading blocks are the same in every row; a single row shares none."""
    if len(tables) == 1:
        return 0
    same = (tables == tables[:1]).all(0)
    return int(same.long().cumprod(0).sum())


def _decode_rows(
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    sequences: Sequence[int],
    alibi_slopes: Tensor | None,
) -> DecodeRows:
    rows, tables, lengths = (x.to(torch.int32) for x in (query_starts[:-1], block_table, context_lengths))
    if len(sequences) < len(lengths):
        rows, tables, lengths = (x[sequences] for x in (rows, tables, lengths))
    slopes = None if alibi_slopes is None else alibi_slopes.float()
    return DecodeRows(rows, tables.contiguous(), lengths.contiguous(), slopes)


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
    is_whole = num_queries == context and alibi_slopes is None
    if alibi_slopes is not None:
        mask = alibi_bias(alibi_slopes, num_queries, context).to(dtype)
    elif num_queries > 1 and not is_whole:
        mask = torch.ones(num_queries, context, dtype=torch.bool).tril(context - num_queries)
    return SpanPlan(first, end, blocks[: -(-context // block_size)], context, mask, is_whole)


def _plan_of_spans(
    row: int,
    first: int,
    end: int,
    blocks: Tensor,
    context: int,
    block_size: int,
    dtype: torch.dtype,
    alibi_slopes: Tensor | None,
    spans: Spans,
) -> SpanPlan:
    key_positions = spans.of_keys(row, context, block_size)
    distance = key_positions - spans.positions[first:end, None]  # [Q, C]
    is_hidden = (key_positions < 0) | (distance > 0)
    mask = ~is_hidden
    if alibi_slopes is not None:
        bias = alibi_slopes.float()[:, None, None] * distance
        mask = bias.masked_fill(is_hidden, float("-inf")).to(dtype)
    unfilled = (key_positions < 0).nonzero()[:, 0]
    return SpanPlan(first, end, blocks[: -(-context // block_size)], context, mask, False, unfilled)


def attend(query: Tensor, kv_cache: Tensor, plan: GatherPlan, scale: float) -> Tensor:
    """Attend to the cache [N, 2, G, B, K]: query [T, H, K] -> [T, H, K]."""
    if plan.decode is None and len(plan.spans) == 1:
        return _attend_span(query, kv_cache, plan.spans[0], scale)
    if isinstance(plan.decode, DecodePlan) and len(plan.decode.rows) == len(query):
        return _attend_gathered(query, kv_cache, plan.decode, scale)
    out = query.new_empty(query.shape)
    for span in plan.spans:
        out[span.first : span.end] = _attend_span(query[span.first : span.end], kv_cache, span, scale)
    if isinstance(plan.decode, DecodeRows):
        _attend_in_loop(query, kv_cache, plan.decode, scale, out)
    elif plan.decode is not None:
        out[plan.decode.rows] = _attend_gathered(query[plan.decode.rows], kv_cache, plan.decode, scale)
    return out


def gather_blocks(kv_cache: Tensor, blocks: Tensor) -> Tensor:
    """Copy the keys and values of these blocks: [2, G, len(blocks) * B, K]."""
    return kv_cache.permute(1, 2, 0, 3, 4).index_select(2, blocks).flatten(2, 3)


def _attend_span(query: Tensor, kv_cache: Tensor, span: SpanPlan, scale: float) -> Tensor:
    kv = gather_blocks(kv_cache, span.blocks)[:, None, :, : span.context]
    if span.unfilled is not None:
        kv.index_fill_(3, span.unfilled, 0)
    key, value = kv
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, span.mask, is_causal=span.is_causal, scale=scale, enable_gqa=True
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
    shared_key, shared_value = gather_blocks(kv_cache, plan.shared)  # [G, C, K]
    shared_scores = (flat @ shared_key.transpose(1, 2)).view(*grouped.shape[:3], -1)
    scores = torch.cat([shared_scores, scores], dim=-1)
    weights = torch.add(plan.mask, scores, alpha=scale).softmax(-1).to(query.dtype)
    shared_weights, unshared_weights = weights.split([shared_key.shape[1], unshared_key.shape[2]], dim=-1)
    shared_out = (shared_weights.reshape(*flat.shape[:2], -1) @ shared_value).view(grouped.shape)
    return (unshared_weights @ unshared_value + shared_out).transpose(0, 1).reshape(query.shape)


@inlined
def softmax(x, first, num_keys):
    top = x[first]
    for i in range(first, first + num_keys):
        top = max(top, x[i])
    total = np.float32(0)
    for i in range(first, first + num_keys):
        x[i] = exp(x[i] - top)
        total += x[i]
    share = np.float32(1) / total
    for i in range(first, first + num_keys):
        x[i] *= share


@inlined
def attend_row(
    query, kv_cache, out, tables, slopes, scale, has_slopes, at, to, table, num_keys, num_kv_heads, block_size,
    block_stride, head_dim, group,
):  # fmt: skip
    """Attend with one query, whose first element is at `at`, to `num_keys` keys in the blocks from `table` on.

    The output begins at `to`. The query heads of one key head go together, so that a key is read once for all of them.
    """
    size = group * head_dim
    q, o, numbers = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(head_dim, np.float32)
    weights = np.empty(group * num_keys, np.float32)
    for kv_head in range(num_kv_heads):
        for i in range(size):
            q[i] = load(query, at + kv_head * size + i) * scale
            o[i] = np.float32(0)
        for first in range(0, num_keys, block_size):
            keys = tables[table + first // block_size] * block_stride + kv_head * block_size * head_dim
            for key in range(first, min(first + block_size, num_keys)):
                for i in range(head_dim):
                    numbers[i] = load(kv_cache, keys + (key - first) * head_dim + i)
                for head in range(group):
                    score = np.float32(0)
                    for i in range(head_dim):
                        score += q[head * head_dim + i] * numbers[i]
                    if has_slopes:
                        score += slopes[kv_head * group + head] * np.float32(key - (num_keys - 1))
                    weights[head * num_keys + key] = score
        for head in range(group):
            softmax(weights, head * num_keys, num_keys)
        for first in range(0, num_keys, block_size):
            values = (
                tables[table + first // block_size] * block_stride + (num_kv_heads + kv_head) * block_size * head_dim
            )
            for key in range(first, min(first + block_size, num_keys)):
                for i in range(head_dim):
                    numbers[i] = load(kv_cache, values + (key - first) * head_dim + i)
                for head in range(group):
                    weight = weights[head * num_keys + key]
                    for i in range(head_dim):
                        o[head * head_dim + i] += weight * numbers[i]
        for i in range(size):
            store(out, to + kv_head * size + i, o[i])


@compiled_for("T* T* T* int32* int32* int32* float32* float int int int int int int int int")
def _attend_rows(head_dim, group):
    def attend_rows(
        query, kv_cache, out, rows, tables, lengths, slopes, scale, has_slopes, num_sequences, num_kv_heads, block_size,
        table_width, query_stride, block_stride, runtime_dim,
    ):  # fmt: skip
        width = length(kv_cache, head_dim, runtime_dim)
        for sequence in range(num_sequences):
            row = rows[sequence]
            attend_row(
                query, kv_cache, out, tables, slopes, scale, has_slopes, row * query_stride,
                row * num_kv_heads * group * width, sequence * table_width, lengths[sequence], num_kv_heads, block_size,
                block_stride, width, group,
            )  # fmt: skip

    return attend_rows


def _attend_in_loop(query: Tensor, kv_cache: Tensor, plan: DecodeRows, scale: float, out: Tensor) -> None:
    """Attend with the rows of `plan` of query [T, H, K], into those rows of out [T, H, K]."""
    _, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    num_sequences, table_width = plan.tables.shape
    query, slopes = with_whole_heads(query), plan.slopes
    _attend_rows[head_dim, num_heads // num_kv_heads][query.dtype](
        query.data_ptr(), kv_cache.data_ptr(), out.data_ptr(), plan.rows.data_ptr(), plan.tables.data_ptr(),
        plan.lengths.data_ptr(), 0 if slopes is None else slopes.data_ptr(), scale, slopes is not None, num_sequences,
        num_kv_heads, block_size, table_width, query.stride(0), kv_cache.stride(0), head_dim,
    )  # fmt: skip


def decode_attention_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, plan: DecodeRows, scale: float
) -> Tensor:
    block_size, head_dim = kv_cache.shape[3:]
    num_kv_heads, last = kv_cache.shape[2], plan.lengths.long() - 1
    heads = qkv.unflatten(-1, (-1, head_dim))
    rotated = rotate_(heads[:, :-num_kv_heads].clone(), cos, sin)
    query, key = rotated[:, :-num_kv_heads], rotated[:, -num_kv_heads:]
    blocks = plan.tables.long().gather(1, (last // block_size)[:, None])[:, 0]
    kv_store(key, heads[:, -num_kv_heads:], kv_cache, blocks * block_size + last % block_size)
    spans = [
        _span_plan(row, row + 1, table, context, block_size, qkv.dtype, None)
        for row, (table, context) in enumerate(zip(plan.tables, plan.lengths.tolist(), strict=True))
    ]
    return attend(query, kv_cache, GatherPlan(None, spans), scale).flatten(1)


@compiled_for("T* T* T* T* T* int32* int32* float int int int int int int int int")
def _rotate_store_attend(head_dim, group):
    def rotate_store_attend(
        qkv, cos, sin, kv_cache, out, tables, lengths, scale, num_sequences, num_kv_heads, block_size, table_width,
        qkv_stride, block_stride, rotary_dim, runtime_dim,
    ):  # fmt: skip
        width = length(kv_cache, head_dim, runtime_dim)
        size = num_kv_heads * width
        for row in range(num_sequences):
            at, table, last = row * qkv_stride, row * table_width, lengths[row] - 1
            rotate_heads(qkv, cos, sin, at, row * rotary_dim, (group + 1) * num_kv_heads, width, rotary_dim)
            target = tables[table + last // block_size] * block_stride + last % block_size * width
            key = at + group * size
            store_token(qkv, qkv, kv_cache, key, key + size, target, num_kv_heads, block_size, width)
            no_slopes = lengths  # never read
            attend_row(
                qkv, kv_cache, out, tables, no_slopes, scale, False, at, row * group * size, table, last + 1, num_kv_heads,
                block_size, block_stride, width, group,
            )  # fmt: skip

    return rotate_store_attend


def decode_attention(qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, plan: DecodeRows, scale: float) -> Tensor:
    """Rotate and store the rows' keys and values, and attend: qkv [S, (H + 2 G) K], overwritten -> [S, H K].

    cos and sin [S, 1, rotary_dim]; kv_cache [N, 2, G, B, K], for which `plan` was built. All rows are the last tokens of
    their sequences, so that the block table says where each key is stored. On a CPU it is one call instead of three
    operators and the views between them.
    """
    num_sequences, width = qkv.shape
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    group = width // (num_kv_heads * head_dim) - 2
    out = qkv.new_empty(num_sequences, group * num_kv_heads * head_dim)
    _rotate_store_attend[head_dim, group][qkv.dtype](
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), kv_cache.data_ptr(), out.data_ptr(), plan.tables.data_ptr(),
        plan.lengths.data_ptr(), scale, num_sequences, num_kv_heads, block_size, plan.tables.shape[1], qkv.stride(0),
        kv_cache.stride(0), cos.shape[-1], head_dim,
    )  # fmt: skip
    return out
