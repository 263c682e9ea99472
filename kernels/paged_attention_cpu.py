"""Paged attention on a CPU: a compiled loop for few new tokens per sequence, products of gathered blocks for many.

A `GatherPlan` holds the blocks and masks that all layers of a step share. In a run of few new tokens, each token is treated
as a decoding sequence, and the loop goes through its blocks. The blocks of a run of many new tokens are gathered. Those of
many decoding sequences that share most of their keys are gathered together, so that blocks which all of them have in the
same place are read once. A GPU without Triton uses the products, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has_bfloat16, use_compiled
from kernels.paged_attention_loop import LoopRows, attend_in_loop
from kernels.self_attention import alibi_bias, is_contiguous_in_blocks
from kernels.spans import KeyRotation, Spans

# The loop computes a sequence of at most this many new tokens, if they need at most this many multiplications with keys:
# query heads times head size times keys, summed over the tokens. For more, a matrix product is faster
MAX_LOOP_TOKENS = 64
MAX_LOOP_PRODUCTS = 1 << 23
# The loop computes decoding rows that share keys, if they need at most this many multiplications with keys of other rows
MAX_REPEATED_PRODUCTS = 1 << 26


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """Queries whose keys and values are gathered for a product: the blocks that all share, and each one's own."""

    rows: Tensor  # [S]
    shared: Tensor  # [W], the blocks that all queries have in the same place
    shared_unfilled: Tensor | None  # indices among their slots [C] of those without a valid key, if there are any
    unshared: Tensor  # [S * W'], the other blocks of each
    unfilled: Tensor  # indices among the slots of all unshared blocks [S * C'] of those that hold no key for their row
    mask: Tensor  # float32 [1, S, 1, C + C'], with ALiBi [G, S, H / G, C + C'], added to the scores
    shared_rotation: KeyRotation | None
    unshared_rotation: KeyRotation | None
    dtype: torch.dtype  # of the products


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """The queries of one sequence, rows first .. end."""

    first: int
    end: int
    blocks: Tensor
    num_slots: int
    mask: Tensor | None  # None: causal from the start of the sequence
    unfilled: Tensor | None = None  # indices of slots without a valid key, if there may be any
    rotation: KeyRotation | None = None


@dataclass(frozen=True, slots=True)
class GatherPlan:
    loop: LoopRows | None  # the rows that the compiled loop computes
    gathered: GatheredRows | None
    pieces: list[PiecePlan]

    def only_loop(self, num_tokens: int) -> LoopRows | None:
        """Return the rows of the compiled loop if it computes all `num_tokens` of the step, else None."""
        return self.loop if self.loop is not None and len(self.loop.rows) == num_tokens else None


class _Step(NamedTuple):
    kv_cache: Tensor
    block_table: Tensor
    alibi_slopes: Tensor | None
    spans: Spans | None

    @property
    def block_size(self) -> int:
        return self.kv_cache.shape[3]


class _Run(NamedTuple):
    """The queries of one sequence, rows first .. end, and its slots up to the last of them."""

    sequence: int
    first: int
    end: int
    context: int

    @property
    def num_queries(self) -> int:
        return self.end - self.first

    @property
    def lengths(self) -> range:
        """The number of slots up to each query."""
        return range(self.context - self.num_queries + 1, self.context + 1)

    @property
    def num_slots(self) -> int:
        """The number of slots that the queries read, summed over the queries."""
        return self.num_queries * (self.lengths.start + self.context) // 2


class _Queries(NamedTuple):
    """Queries of any runs: the row of each, its sequence, and the number of slots up to its own."""

    rows: list[int]
    sequences: list[int]
    lengths: list[int]

    @classmethod
    def of(cls, runs: Sequence[_Run]) -> _Queries:
        return cls(
            [row for run in runs for row in range(run.first, run.end)],
            [run.sequence for run in runs for _ in run.lengths],
            [length for run in runs for length in run.lengths],
        )


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
    step = _Step(kv_cache, block_table, alibi_slopes, spans)
    contexts, bounds = context_lengths.tolist(), pairwise(query_starts.tolist())
    runs = [_Run(i, first, end, contexts[i]) for i, (first, end) in enumerate(bounds) if end > first]
    may_loop = use_compiled(kv_cache[:0]) and is_contiguous_in_blocks(kv_cache)
    products_per_key = num_heads * kv_cache.shape[-1]
    decoding = _Queries.of([run for run in runs if run.num_queries == 1])
    gathered = _gathered_unless_looped(step, decoding, products_per_key, may_loop=may_loop)
    looped, pieces = list[_Run](), list[_Run]()  # in the order of the runs
    for run in runs:
        if run.num_queries == 1:
            looped += [run] if gathered is None else []
        else:
            is_short = run.num_queries <= MAX_LOOP_TOKENS and run.num_slots * products_per_key <= MAX_LOOP_PRODUCTS
            (looped if may_loop and is_short else pieces).append(run)
    loop = _loop_rows(step, _Queries.of(looped)) if looped else None
    plan_piece = _plan_piece if spans is None else _plan_piece_of_spans
    return GatherPlan(loop, gathered, [plan_piece(step, run) for run in pieces])


def _gathered_unless_looped(
    step: _Step, queries: _Queries, products_per_key: int, *, may_loop: bool
) -> GatheredRows | None:
    """Return what decoding rows gather, or None if the loop computes them: unless many rows share most of many keys."""
    most_repeated = sum(queries.lengths[1:]) * products_per_key  # if the rows share all keys
    if not queries.rows or (may_loop and most_repeated <= MAX_REPEATED_PRODUCTS):
        return None
    is_shared = _shared_columns(step, queries)
    num_shared = int(is_shared.sum()) * step.block_size
    repeated = num_shared * (len(queries.rows) - 1) * products_per_key
    if may_loop and (repeated <= MAX_REPEATED_PRODUCTS or 2 * num_shared < max(queries.lengths)):
        return None
    return _gathered_rows(step, queries, is_shared)


def _shared_columns(step: _Step, queries: _Queries) -> Tensor:
    """Return which columns [W] of the block table are full of the same keys at the same positions for all queries."""
    width, spans = -(-max(queries.lengths) // step.block_size), step.spans
    tables = [step.block_table, *([] if spans is None else spans.block_tables)]
    is_shared = _equal_columns(*(table[queries.sequences, :width] for table in tables))
    is_shared[(min(queries.lengths) - 1) // step.block_size :] = False
    return is_shared


def _gathered_rows(step: _Step, queries: _Queries, is_shared: Tensor) -> GatheredRows:
    block_size, slopes, lengths = step.block_size, step.alibi_slopes, queries.lengths
    width, rows = -(-max(lengths) // block_size), torch.tensor(queries.rows, device=step.kv_cache.device)
    spans = None if step.spans is None else step.spans.select(rows, queries.sequences)
    num_shared = int(is_shared.sum())
    columns: Tensor | slice = slice(width)
    if num_shared:
        columns = torch.cat([is_shared.nonzero()[:, 0], (~is_shared).nonzero()[:, 0]])
    tables = step.block_table[queries.sequences, :width][:, columns]
    contexts = torch.tensor(lengths, device=rows.device)
    distance, is_empty = _distances(contexts, columns, block_size, spans)
    is_hidden = distance > 0 if is_empty is None else is_empty | (distance > 0)  # [S, C + C']
    num_slots = num_shared * block_size
    shared_rotation, unshared_rotation = _rotations(spans, columns, num_shared)
    shared_unfilled = None
    if is_empty is not None and bool(is_empty[0, :num_slots].any()):
        shared_unfilled = is_empty[0, :num_slots].nonzero()[:, 0]
    return GatheredRows(
        rows,
        tables[0, :num_shared],
        shared_unfilled,
        tables[:, num_shared:].flatten().clamp(min=0),
        is_hidden[:, num_slots:].flatten().nonzero()[:, 0],
        _row_mask(distance, is_hidden, slopes, step.kv_cache.shape[2]),
        shared_rotation,
        unshared_rotation,
        _product_dtype(step.kv_cache),
    )


def _product_dtype(kv_cache: Tensor) -> torch.dtype:
    is_emulated = kv_cache.device.type == "cpu" and kv_cache.dtype == torch.bfloat16 and not has_bfloat16()
    return torch.float32 if is_emulated else kv_cache.dtype


def _rotations(
    spans: Spans | None, columns: Tensor | slice, num_shared: int
) -> tuple[KeyRotation | None, KeyRotation | None]:
    """Return the rotations of the shared blocks, which are the first of these columns, and of all rows' other blocks."""
    if spans is None or spans.offsets is None:
        return None, None
    blocks = spans.offsets.blocks[:, columns]
    shared, unshared = blocks[0, :num_shared], blocks[:, num_shared:].flatten()
    return spans.offsets.rotation(shared), spans.offsets.rotation(unshared)


def _equal_columns(*tables: Tensor) -> Tensor:
    """Return which columns [W] are equal in all rows of all tables [S, W]; a single row shares none."""
    if len(tables[0]) == 1:
        return torch.zeros_like(tables[0][0], dtype=torch.bool)
    equal = (tables[0] == tables[0][:1]).all(0)
    for table in tables[1:]:
        equal &= (table == table[:1]).all(0)
    return equal


def _distances(
    contexts: Tensor, columns: Tensor | slice, block_size: int, spans: Spans | None
) -> tuple[Tensor, Tensor | None]:
    """Return, for each row, the distances from its query to the keys in these columns, and which slots hold no key.

    Both are [S, C]. In plain sequences, every slot up to the query's holds a key.
    """
    if spans is None:
        device = contexts.device
        blocks = torch.arange(columns.stop, device=device) if isinstance(columns, slice) else columns
        keys = (blocks[:, None] * block_size + torch.arange(block_size, device=device)).flatten()
        return keys - (contexts[:, None] - 1), None
    keys, is_empty = spans.keys(columns, block_size)
    return keys - spans.positions[:, None], is_empty


def _row_mask(distance: Tensor, is_hidden: Tensor, slopes: Tensor | None, num_kv_heads: int) -> Tensor:
    if slopes is None:
        return torch.zeros_like(distance, dtype=torch.float32).masked_fill(is_hidden, float("-inf"))[None, :, None]
    mask = (slopes.float()[:, None, None] * distance).masked_fill(is_hidden, float("-inf"))
    return mask.unflatten(0, (num_kv_heads, -1)).transpose(1, 2).contiguous()


def _loop_rows(step: _Step, queries: _Queries) -> LoopRows:
    rows, lengths = (torch.tensor(numbers, dtype=torch.int32) for numbers in (queries.rows, queries.lengths))
    tables = step.block_table.to(torch.int32)
    if queries.sequences != [*range(len(tables))]:  # otherwise each has one query
        tables = tables[queries.sequences]
    spans = None if step.spans is None else step.spans.select(rows.long(), queries.sequences)
    slopes = None if step.alibi_slopes is None else step.alibi_slopes.float()
    return LoopRows(rows, tables.contiguous(), lengths, slopes, spans)


def _plan_piece(step: _Step, run: _Run) -> PiecePlan:
    context, num_queries, slopes, mask = run.context, run.num_queries, step.alibi_slopes, None
    if slopes is not None:
        mask = alibi_bias(slopes, num_queries, context).to(step.kv_cache.dtype)
    elif num_queries < context:
        mask = step.kv_cache.new_ones(num_queries, context, dtype=torch.bool).tril(context - num_queries)
    blocks = step.block_table[run.sequence, : -(-context // step.block_size)]
    return PiecePlan(run.first, run.end, blocks, context, mask)


def _plan_piece_of_spans(step: _Step, run: _Run) -> PiecePlan:
    assert step.spans is not None
    context, block_size, slopes = run.context, step.block_size, step.alibi_slopes
    width, spans = -(-context // block_size), step.spans.select(slice(run.first, run.end), [run.sequence])
    keys, is_empty = (x[0, :context] for x in spans.keys(slice(width), block_size))
    distance = keys - spans.positions[:, None]  # [Q, C]
    is_hidden = is_empty | (distance > 0)
    mask = ~is_hidden
    if slopes is not None:
        bias = slopes.float()[:, None, None] * distance
        mask = bias.masked_fill(is_hidden, float("-inf")).to(step.kv_cache.dtype)
    rotation = None if spans.offsets is None else spans.offsets.rotation(spans.offsets.blocks[0, :width])
    blocks, unfilled = step.block_table[run.sequence, :width], is_empty.nonzero()[:, 0]
    return PiecePlan(run.first, run.end, blocks, context, mask, unfilled, rotation)


def attend(query: Tensor, kv_cache: Tensor, plan: GatherPlan, scale: float) -> Tensor:
    """Attend to the cache [N, 2, G, B, K]: query [T, H, K] -> [T, H, K]."""
    if plan.loop is None and plan.gathered is None and len(plan.pieces) == 1:
        return _attend_piece(query, kv_cache, plan.pieces[0], scale)
    if plan.gathered is not None and len(plan.gathered.rows) == len(query):
        return _attend_gathered(query, kv_cache, plan.gathered, scale)
    out = query.new_empty(query.shape)
    for piece in plan.pieces:
        out[piece.first : piece.end] = _attend_piece(query[piece.first : piece.end], kv_cache, piece, scale)
    if plan.gathered is not None:
        rows = plan.gathered.rows
        out[rows] = _attend_gathered(query[rows], kv_cache, plan.gathered, scale)
    if plan.loop is not None:
        attend_in_loop(query, kv_cache, plan.loop, scale, out)
    return out


def gather_blocks(kv_cache: Tensor, blocks: Tensor, rotation: KeyRotation | None = None) -> Tensor:
    """Copy the keys and values of these blocks, [2, G, len(blocks) * B, K], with keys rotated to where a row sees them."""
    kv = kv_cache.permute(1, 2, 0, 3, 4).index_select(2, blocks)
    if rotation is not None:
        rotation.apply_(kv[0])
    return kv.flatten(2, 3)


def _attend_piece(query: Tensor, kv_cache: Tensor, piece: PiecePlan, scale: float) -> Tensor:
    kv = gather_blocks(kv_cache, piece.blocks, piece.rotation)[:, :, : piece.num_slots]
    if piece.unfilled is not None:
        kv.index_fill_(2, piece.unfilled, 0)
    key, value = kv[:, None]
    is_causal = piece.mask is None
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, piece.mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _attend_gathered(query: Tensor, kv_cache: Tensor, plan: GatheredRows, scale: float) -> Tensor:
    """Attend with one softmax over the shared keys and each query's own: query [S, H, K] -> [S, H, K]."""
    num_queries, _, head_dim = query.shape
    num_kv_heads, dtype = kv_cache.shape[2], plan.dtype
    grouped = query.view(num_queries, num_kv_heads, -1, head_dim).transpose(0, 1).to(dtype)  # [G, S, H / G, K]
    unshared = gather_blocks(kv_cache, plan.unshared, plan.unshared_rotation).index_fill_(2, plan.unfilled, 0).to(dtype)
    unshared_key, unshared_value = unshared.unflatten(2, (num_queries, -1))  # [G, S, C', K]
    scores = grouped @ unshared_key.transpose(2, 3)
    if not len(plan.shared):
        out = torch.add(plan.mask, scores, alpha=scale).softmax(-1).to(dtype) @ unshared_value
        return out.transpose(0, 1).reshape(query.shape).to(query.dtype)
    flat = grouped.reshape(num_kv_heads, -1, head_dim)
    shared = gather_blocks(kv_cache, plan.shared, plan.shared_rotation).to(dtype)
    if plan.shared_unfilled is not None:
        shared.index_fill_(2, plan.shared_unfilled, 0)
    shared_key, shared_value = shared  # [G, C, K]
    shared_scores = (flat @ shared_key.transpose(1, 2)).view(*grouped.shape[:3], -1)
    scores = torch.cat([shared_scores, scores], dim=-1)
    weights = torch.add(plan.mask, scores, alpha=scale).softmax(-1).to(dtype)
    shared_weights, unshared_weights = weights.split([shared_key.shape[1], unshared_key.shape[2]], dim=-1)
    shared_out = (shared_weights.reshape(*flat.shape[:2], -1) @ shared_value).view(grouped.shape)
    return (unshared_weights @ unshared_value + shared_out).transpose(0, 1).reshape(query.shape).to(query.dtype)
