"""Attention of decoding rows as one compiled loop: each sequence's one query goes through that sequence's own blocks.

Nothing is gathered and nothing is padded; a row's sums are the same whoever decodes beside it. One thread: where there is
much to read, `paged_gather` gathers for a product instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.compiled import compiled_for, exp, inlined, length, load, store


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows [S] of a step, block tables [S, W], context lengths [S], all int32; slopes [H] float32."""

    rows: Tensor
    tables: Tensor
    lengths: Tensor
    slopes: Tensor | None


def decode_rows(
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    sequences: Sequence[int],
    alibi_slopes: Tensor | None,
) -> DecodeRows | None:
    """`sequences`: those with one query."""
    if not sequences:
        return None
    rows, tables, lengths = (x.to(torch.int32) for x in (query_starts[:-1], block_table, context_lengths))
    if len(sequences) < len(lengths):
        rows, tables, lengths = (x[sequences] for x in (rows, tables, lengths))
    slopes = None if alibi_slopes is None else alibi_slopes.float()
    return DecodeRows(rows, tables.contiguous(), lengths.contiguous(), slopes)


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
    """One query, its first number at `at`, over `num_keys` keys in the blocks from `table` on; its output begins at `to`.
    The query heads of one key head go together, so that a key is read once for all of them."""
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
        table_width, query_stride, block_stride, given_dim,
    ):  # fmt: skip
        width = length(kv_cache, head_dim, given_dim)
        for sequence in range(num_sequences):
            row = rows[sequence]
            attend_row(
                query, kv_cache, out, tables, slopes, scale, has_slopes, row * query_stride,
                row * num_kv_heads * group * width, sequence * table_width, lengths[sequence], num_kv_heads, block_size,
                block_stride, width, group,
            )  # fmt: skip

    return attend_rows


def attend_each(query: Tensor, kv_cache: Tensor, plan: DecodeRows, scale: float, out: Tensor) -> None:
    """The rows of `plan` of query [T, H, K], into those of out [T, H, K]"""
    _, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    num_sequences, table_width = plan.tables.shape
    slopes = plan.slopes
    if query.stride()[1:] != (head_dim, 1):
        query = query.contiguous()
    _attend_rows[head_dim, num_heads // num_kv_heads][query.dtype](
        query.data_ptr(), kv_cache.data_ptr(), out.data_ptr(), plan.rows.data_ptr(), plan.tables.data_ptr(),
        plan.lengths.data_ptr(), 0 if slopes is None else slopes.data_ptr(), scale, slopes is not None, num_sequences,
        num_kv_heads, block_size, table_width, query.stride(0), kv_cache.stride(0), head_dim,
    )  # fmt: skip
