"""Paged attention for few new tokens on a CPU: a compiled loop over the blocks of each row.

It needs no copies and no padding, and sums a row in the same order in every batch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.attention_tile import add_values, prefetch, score_keys
from kernels.compiled import (
    DTYPES,
    exp,
    float32s,
    from_ordered_bits,
    inlined,
    int32s,
    load,
    ordered_bits,
    pointer_to_dtype,
    store,
)
from kernels.spans import Offsets, Spans
from kernels.threads import indices, run_on_threads, take, threaded
from kernels.tiles import with_whole_heads


class Cache(NamedTuple):
    """The address and the sizes of a cache [N, 2, G, B, K], for compiled loops."""

    elements: Any
    num_heads: int
    block_size: int
    block_stride: int


class RowTables(NamedTuple):
    """The addresses of the tables of `LoopRows`, and the widths of a block table and of an angle, for compiled loops."""

    tables: Any
    lengths: Any
    positions: Any
    block_positions: Any
    block_lengths: Any
    block_offsets: Any
    offset_cos: Any
    offset_sin: Any
    width: int
    rotary_dim: int


TABLES = " ".join(RowTables._fields[:-2])
# the arguments of the kernel: addresses of tensors, sizes, and the next task
AT = indices(
    "counter query kv_cache out rows slopes scale num_rows num_kv_heads block_size table_width query_stride block_stride"
    f" rotary_dim {TABLES} task"
)
Arguments = ctypes.c_int64 * len(AT)
# number of scores, query heads times keys, from which two threads are faster than one
MIN_THREADED_SCORES = 1 << 10
# while a block is read, the one this many keys later is requested from memory: blocks of a sequence may be anywhere
KEYS_AHEAD = 16


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

    # looked up once per step: the addresses of `TABLES`, 0 for those that `spans` lacks; the sum of the lengths
    addresses: tuple[int, ...] = field(init=False, repr=False)
    num_slots: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tables, spans = [self.tables, self.lengths], self.spans
        if spans is not None:
            tables += [spans.positions, spans.block_positions, spans.block_lengths]
        if self.offsets is not None:
            tables += [self.offsets.blocks, self.offsets.cos, self.offsets.sin]
        addresses = [table.data_ptr() for table in tables]
        object.__setattr__(self, "num_slots", int(self.lengths.sum()))
        object.__setattr__(self, "addresses", (*addresses, *[0] * (len(TABLES.split()) - len(addresses))))

    @property
    def offsets(self) -> Offsets | None:
        return None if self.spans is None else self.spans.offsets

    @property
    def rotary_dim(self) -> int:
        """The number of elements of a head that offsets rotate."""
        return 0 if self.offsets is None else self.offsets.cos.shape[1]

    def num_threads(self, num_heads: int) -> int | None:
        """Return the number of threads that attend with this number of query heads; None: all."""
        return 1 if self.num_slots * num_heads < MIN_THREADED_SCORES else None


@inlined
def row_tables(arguments, first, width, rotary_dim):
    """Return the tables whose addresses begin at index `first` of a kernel's arguments."""
    return RowTables(
        int32s(arguments[first]), int32s(arguments[first + 1]), int32s(arguments[first + 2]), int32s(arguments[first + 3]),
        int32s(arguments[first + 4]), int32s(arguments[first + 5]), float32s(arguments[first + 6]),
        float32s(arguments[first + 7]), width, rotary_dim,
    )  # fmt: skip


@inlined
def softmax(x, first, num_keys):
    """Replace the scores x[first], ... by their weights."""
    begin, end = np.uint64(first), np.uint64(first + num_keys)  # an index that may be negative hinders vectorisation
    highest = np.int32(-(2**31))
    for i in range(begin, end):
        highest = max(highest, ordered_bits(x[i]))
    top, total = from_ordered_bits(highest), np.float32(0)
    for i in range(begin, end):
        weight = exp(x[i] - top)
        x[i] = weight
        total += weight
    share = np.float32(1) / total
    for i in range(begin, end):
        x[i] *= share


@inlined
def rotate_back(rotated, x, cos, sin, angle, num_heads, head_dim, rotary_dim):
    """Write into `rotated` the heads of x rotated back by the angles that begin at `angle`; other elements stay."""
    half = rotary_dim // 2
    for head in range(0, num_heads * head_dim, head_dim):
        for i in range(half):
            low, high = x[head + i], x[head + half + i]
            rotated[head + i] = low * cos[angle + i] - high * sin[angle + i]
            rotated[head + half + i] = high * cos[angle + half + i] - low * sin[angle + half + i]


def row_attention(head_dim: int, group: int, has_spans: int, has_offsets: int) -> Any:
    """Return a part of kernels that attends with one query, whose first element is at `at`; the output begins at `to`.

    The `group` query heads of one key head are computed, so that a key is read once for all of them. At each change in
    `block_offsets`, the query is rotated back by a row of `offset_cos` and `offset_sin`. Slopes are read if `has_slopes`.
    """
    size, score, add = group * head_dim, score_keys(head_dim, group), add_values(head_dim, group)

    @inlined
    def keys_of(rows, block, entry, position, num_slots, block_size):
        """Return the position of the first key of a block, and the number of its keys that the query reads."""
        if has_spans:
            begin = np.int64(rows.block_positions[entry])
            return begin, np.int64(max(min(rows.block_lengths[entry], position + 1 - begin), 0))
        begin = np.int64(block * block_size)
        return begin, np.int64(min(block_size, num_slots - begin))

    @inlined
    def attend_row(query, cache, out, rows, slopes, scale, has_slopes, at, to, row, kv_head):
        kv_cache, tables, block_size = cache.elements, rows.tables, cache.block_size
        num_slots = np.int64(rows.lengths[row])
        position = np.int64(rows.positions[row]) if has_spans else num_slots - 1
        table, last = row * rows.width, row * rows.width + (num_slots - 1) // block_size
        block_dim, ahead = block_size * head_dim, max(KEYS_AHEAD // block_size, 1)
        stride = num_slots | 16  # scores of two heads are not at the same place of a processor's cache
        q, o, weights = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(group * stride, np.float32)
        base, offset = np.empty(size, np.float32) if has_offsets else q, np.int64(0)
        first_key, first_value = kv_head * block_dim, (cache.num_heads + kv_head) * block_dim
        for i in range(size):
            q[i] = load(query, at + kv_head * size + i) * scale
            o[i] = np.float32(0)
        if has_offsets:
            for i in range(size):
                base[i] = q[i]
        num_keys = np.int64(0)
        for entry in range(table, last + 1):
            prefetch(kv_cache, tables[min(entry + ahead, last)] * cache.block_stride + first_key, block_dim)
            begin, count = keys_of(rows, entry - table, entry, position, num_slots, block_size)
            if has_offsets and rows.block_offsets[entry] != offset:
                offset, width = np.int64(rows.block_offsets[entry]), rows.rotary_dim
                rotate_back(q, base, rows.offset_cos, rows.offset_sin, offset * width, group, head_dim, width)
            score(q, kv_cache, tables[entry] * cache.block_stride + first_key, count, weights, num_keys, stride)
            if has_slopes:
                for head in range(group):
                    for key in range(count):
                        bias = slopes[kv_head * group + head] * np.float32(begin + key - position)
                        weights[head * stride + num_keys + key] += bias
            num_keys += count
        for head in range(group):
            softmax(weights, head * stride, num_keys)
        num_keys = np.int64(0)
        for entry in range(table, last + 1):
            prefetch(kv_cache, tables[min(entry + ahead, last)] * cache.block_stride + first_value, block_dim)
            _, count = keys_of(rows, entry - table, entry, position, num_slots, block_size)
            add(o, kv_cache, tables[entry] * cache.block_stride + first_value, count, weights, num_keys, stride)
            num_keys += count
        for i in range(size):
            store(out, to + kv_head * size + i, o[i])

    return attend_row


@threaded
def _attend_rows(dtype, head_dim, group, has_spans, has_offsets):
    attend_row, elements = row_attention(head_dim, group, has_spans, has_offsets), pointer_to_dtype(dtype)

    def attend_rows(arguments):
        query, out, rows = elements(arguments[AT.query]), elements(arguments[AT.out]), int32s(arguments[AT.rows])
        slopes, scale = float32s(arguments[AT.slopes]), float32s(arguments[AT.scale])[0]
        num_rows, num_kv_heads, stride = arguments[AT.num_rows], arguments[AT.num_kv_heads], arguments[AT.query_stride]
        kv_cache, block_size = elements(arguments[AT.kv_cache]), arguments[AT.block_size]
        cache = Cache(kv_cache, num_kv_heads, block_size, arguments[AT.block_stride])
        tables = row_tables(arguments, AT.tables, arguments[AT.table_width], arguments[AT.rotary_dim])
        task = take(arguments, AT.task)
        while task < num_rows * num_kv_heads:
            entry, kv_head = task // num_kv_heads, task % num_kv_heads
            row = np.int64(rows[entry])
            at, to = row * stride, row * num_kv_heads * group * head_dim
            attend_row(query, cache, out, tables, slopes, scale, arguments[AT.slopes] != 0, at, to, entry, kv_head)
            task = take(arguments, AT.task)

    return attend_rows


def kernel_sizes(kv_cache: Tensor, num_heads: int, *, has_spans: bool, has_offsets: bool) -> tuple[int, ...]:
    """Return for what kernels of attention are compiled: the cache's dtype, heads, and what rows have."""
    _, _, num_kv_heads, _, head_dim = kv_cache.shape
    return DTYPES.index(kv_cache.dtype), head_dim, num_heads // num_kv_heads, has_spans, has_offsets


def compile_loop(sizes: tuple[int, ...]) -> None:
    """Compile the loop for these `kernel_sizes`."""
    _attend_rows[sizes]


@cache
def as_tensor(number: float) -> Tensor:
    return torch.tensor([number], dtype=torch.float32)


def attend_in_loop(query: Tensor, kv_cache: Tensor, plan: LoopRows, scale: float, out: Tensor) -> None:
    """Attend with the rows of `plan` of query [T, H, K], into those rows of out [T, H, K]."""
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    num_rows, table_width = plan.tables.shape
    query, slopes = with_whole_heads(query), plan.slopes
    sizes = kernel_sizes(
        kv_cache, query.shape[1], has_spans=plan.spans is not None, has_offsets=plan.offsets is not None
    )
    arguments = Arguments(
        0, query.data_ptr(), kv_cache.data_ptr(), out.data_ptr(), plan.rows.data_ptr(),
        0 if slopes is None else slopes.data_ptr(), as_tensor(scale).data_ptr(), num_rows, num_kv_heads, block_size,
        table_width, query.stride(0), kv_cache.stride(0), plan.rotary_dim, *plan.addresses,
    )  # fmt: skip
    run_on_threads(_attend_rows[sizes], arguments, plan.num_threads(query.shape[1]))
