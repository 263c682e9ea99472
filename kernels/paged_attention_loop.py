"""Paged attention for few new tokens and few keys on a CPU: a compiled loop over the blocks of each row.

It needs no copies and no padding, runs on one thread, and sums a row in the same order in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels.compiled import compiled_for, exp, inlined, length, load, store
from kernels.spans import Offsets, Spans
from kernels.tiles import with_whole_heads

NUM_ADDRESSES = 8


@dataclass(frozen=True, slots=True)
class LoopRows:
    """Queries, each treated as one of a decoding sequence; all tables are contiguous int32.

    Several may belong to one sequence, in the order of their tokens; none reads slots after its own.
    """

    rows: Tensor  # [S]
    tables: Tensor  # [S, W], blocks
    lengths: Tensor  # [S], number of slots up to the query's own
    slopes: Tensor | None  # [H] float32
    spans: Spans | None = None  # with one position per row

    # the addresses of the tables, the lengths, and the tables of `spans`, looked up once per step
    addresses: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tables, spans = [self.tables, self.lengths], self.spans
        if spans is not None:
            tables += [spans.positions, spans.block_positions, spans.block_lengths]
        if self.offsets is not None:
            tables += [self.offsets.blocks, self.offsets.cos, self.offsets.sin]
        addresses = [table.data_ptr() for table in tables]
        object.__setattr__(self, "addresses", (*addresses, *[0] * (NUM_ADDRESSES - len(addresses))))

    @property
    def offsets(self) -> Offsets | None:
        return None if self.spans is None else self.spans.offsets

    @property
    def rotary_dim(self) -> int:
        """The number of elements of a head that offsets rotate."""
        return 0 if self.offsets is None else self.offsets.cos.shape[1]


@inlined
def softmax(x, row, num_keys):
    """Replace the first scores of a row of x by their weights."""
    top = x[row, 0]
    for i in range(num_keys):
        top = max(top, x[row, i])
    total = np.float32(0)
    for i in range(num_keys):
        x[row, i] = exp(x[row, i] - top)
        total += x[row, i]
    share = np.float32(1) / total
    for i in range(num_keys):
        x[row, i] *= share


@inlined
def rotate_back(rotated, x, cos, sin, angle, num_heads, head_dim, rotary_dim):
    """Write into `rotated` the heads of x rotated back by the angles that begin at `angle`; other elements stay."""
    half = rotary_dim // 2
    for head in range(0, num_heads * head_dim, head_dim):
        for i in range(half):
            low, high = x[head + i], x[head + half + i]
            rotated[head + i] = low * cos[angle + i] - high * sin[angle + i]
            rotated[head + half + i] = high * cos[angle + half + i] - low * sin[angle + half + i]


@inlined
def attend_row(
    query, kv_cache, out, tables, positions, block_positions, block_lengths, block_offsets, offset_cos, offset_sin, slopes,
    scale, has_spans, has_offsets, has_slopes, at, to, row, table_width, num_slots, first_head, end_head, num_kv_heads,
    block_size, block_stride, head_dim, rotary_dim, group,
):  # fmt: skip
    """Attend with one query, whose first element is at `at`, to the keys in its first `num_slots` slots.

    The output begins at `to`. The query heads of one key head are computed together, so that a key is read once for all of
    them; those of the key heads from `first_head` to `end_head` are computed. At each change in `block_offsets`, the query
    is rotated back by a row of `offset_cos` and `offset_sin`.
    """
    size = group * head_dim
    table, position = row * table_width, num_slots - 1
    if has_spans:
        position = np.int64(positions[row])
    q, o, numbers = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(head_dim, np.float32)
    weights = np.empty((group, num_slots), np.float32)
    base, offset = np.empty(size, np.float32) if has_offsets else q, np.int64(0)
    for kv_head in range(first_head, end_head):
        for i in range(size):
            q[i] = load(query, at + kv_head * size + i) * scale
            o[i] = np.float32(0)
        if has_offsets:
            offset = np.int64(0)
            for i in range(size):
                base[i] = q[i]
        num_keys = np.int64(0)
        for first in range(0, num_slots, block_size):
            entry = table + first // block_size
            if has_spans:
                begin = np.int64(block_positions[entry])
                count = np.int64(max(min(block_lengths[entry], position + 1 - begin), 0))
            else:
                begin, count = np.int64(first), np.int64(min(block_size, num_slots - first))
            if has_offsets and block_offsets[entry] != offset:
                offset = np.int64(block_offsets[entry])
                rotate_back(q, base, offset_cos, offset_sin, offset * rotary_dim, group, head_dim, rotary_dim)
            keys = tables[entry] * block_stride + kv_head * block_size * head_dim
            for key in range(count):
                for i in range(head_dim):
                    numbers[i] = load(kv_cache, keys + key * head_dim + i)
                for head in range(group):
                    score = np.float32(0)
                    for i in range(head_dim):
                        score += q[head * head_dim + i] * numbers[i]
                    if has_slopes:
                        score += slopes[kv_head * group + head] * np.float32(begin + key - position)
                    weights[head, num_keys + key] = score
            num_keys += count
        for head in range(group):
            softmax(weights, head, num_keys)
        num_keys = np.int64(0)
        for first in range(0, num_slots, block_size):
            entry = table + first // block_size
            if has_spans:
                begin = np.int64(block_positions[entry])
                count = np.int64(max(min(block_lengths[entry], position + 1 - begin), 0))
            else:
                begin, count = np.int64(first), np.int64(min(block_size, num_slots - first))
            values = tables[entry] * block_stride + (num_kv_heads + kv_head) * block_size * head_dim
            for key in range(count):
                for i in range(head_dim):
                    numbers[i] = load(kv_cache, values + key * head_dim + i)
                for head in range(group):
                    weight = weights[head, num_keys + key]
                    for i in range(head_dim):
                        o[head * head_dim + i] += weight * numbers[i]
            num_keys += count
        for i in range(size):
            store(out, to + kv_head * size + i, o[i])


@compiled_for(
    "T* T* T* int32* int32* int32* int32* int32* int32* int32* float32* float32* float32* float"
    " int int int int int int int int int"
)
def _attend_rows(head_dim, group, has_spans, has_offsets):
    def attend_rows(
        query, kv_cache, out, rows, tables, lengths, positions, block_positions, block_lengths, block_offsets, offset_cos,
        offset_sin, slopes, scale, has_slopes, num_sequences, num_kv_heads, block_size, table_width, query_stride,
        block_stride, runtime_dim, rotary_dim,
    ):  # fmt: skip
        width = length(kv_cache, head_dim, runtime_dim)
        for sequence in range(num_sequences):
            row = rows[sequence]
            attend_row(
                query, kv_cache, out, tables, positions, block_positions, block_lengths, block_offsets, offset_cos,
                offset_sin, slopes, scale, has_spans, has_offsets, has_slopes, row * query_stride,
                row * num_kv_heads * group * width, sequence, table_width, lengths[sequence], 0, num_kv_heads, num_kv_heads,
                block_size, block_stride, width, rotary_dim, group,
            )  # fmt: skip

    return attend_rows


def compile_loop(sizes: tuple[int, int, bool, bool], dtype: torch.dtype) -> None:
    """Compile the loop for a head's size, the query heads per key head, and whether rows have spans, and offsets."""
    _attend_rows[sizes][dtype]


def attend_in_loop(query: Tensor, kv_cache: Tensor, plan: LoopRows, scale: float, out: Tensor) -> None:
    """Attend with the rows of `plan` of query [T, H, K], into those rows of out [T, H, K]."""
    _, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    num_sequences, table_width = plan.tables.shape
    query, slopes = with_whole_heads(query), plan.slopes
    _attend_rows[head_dim, num_heads // num_kv_heads, plan.spans is not None, plan.offsets is not None][query.dtype](
        query.data_ptr(), kv_cache.data_ptr(), out.data_ptr(), plan.rows.data_ptr(), *plan.addresses,
        0 if slopes is None else slopes.data_ptr(), scale, slopes is not None, num_sequences, num_kv_heads,
        block_size, table_width, query.stride(0), kv_cache.stride(0), head_dim, plan.rotary_dim,
    )  # fmt: skip
