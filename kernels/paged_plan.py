"""Tiles of paged attention on a GPU: the rows and keys of each program, planned on the host once per step.

The context of a run of few new tokens is divided into parts of SPLIT slots of its block table. Rows whose tables are equal
over a part share one tile, whether they have only a prefix, a shot in the same place or everything in common. The division
depends only on the run, so a row's result is the same bit for bit in every batch. A run of many new tokens is divided into
tiles of consecutive rows, each over all slots up to its last row.

A step in a CUDA graph reads the tables from buffers of a fixed size, in which empty tiles follow the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import Launch, launch_config
from kernels.spans import Offsets, Spans, slot_positions

# One sequence of 1,000 tokens and 32 heads gives 128 programs, about one per core of an H100.
SPLIT = 256
WHOLE = 1 << 30
TABLES = ("records", "members", "rows")
Array: TypeAlias = NDArray[np.int64]
FACTORS = np.random.default_rng(0).integers(1, 1 << 63, 4096, dtype=np.uint64) * 2 + 1  # odd, for hashes


@dataclass(frozen=True, slots=True)
class TileShape:
    """The sizes of a model and its cache that determine how rows are divided into tiles."""

    block_size: int
    group: int  # query heads per key head
    head_dim: int
    dtype: torch.dtype
    has_offsets: bool = False

    def launches(self) -> tuple[Launch, Launch]:
        """Return the launches for few and for many tokens. Raises `ValueError` if a group of heads exceeds a tile."""
        names = ("paged_offsets", "paged_offsets") if self.has_offsets else ("paged_decode", "paged_prefill")
        few, many = (launch_config(name, self.head_dim, self.dtype) for name in names)
        block = min(few.block, many.block)
        if self.group > block:
            raise ValueError(f"{self.group} query heads per key head do not fit into a tile of {block} rows")
        return few, many


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tables that the programs of one launch read, all int32."""

    records: Tensor  # [n, 5]: first member, number of members, sequence whose table is read, part, end of its slots
    members: Tensor  # [m, 3]: row, row of the output, position
    rows: Tensor  # [R, 2]: row, number of its parts, which are summed at the end; empty if every tile is over all slots
    num_parts: int  # number of parts of the longest row that fits
    split: int
    launch: Launch


@dataclass(frozen=True, slots=True)
class TilePlan:
    """The tiles of one step: of runs of few tokens, in parts, and of runs of many tokens."""

    few: Tiles | None
    many: Tiles | None = None
    keys: Tensor | None = None  # [S, W * B], the position of the key in each slot, made on the device
    offsets: Offsets | None = None

    @property
    def tables(self) -> list[Tensor]:
        """The tables of all tiles, in the order that `with_tables` expects."""
        return [getattr(tiles, name) for tiles in (self.few, self.many) if tiles is not None for name in TABLES]

    def with_tables(self, tables: Iterator[Tensor]) -> TilePlan:
        few, many = (
            None if tiles is None else replace(tiles, records=next(tables), members=next(tables), rows=next(tables))
            for tiles in (self.few, self.many)
        )
        return replace(self, few=few, many=many)

    def to(self, device: torch.device) -> TilePlan:
        return self.with_tables(table.to(device) for table in self.tables)

    def over(self, block_table: Tensor, block_size: int, spans: Spans | None) -> TilePlan:
        """Return the plan with the positions of keys, computed from tables on the device without waiting."""
        offsets = None if spans is None else spans.offsets
        return replace(self, keys=slot_positions(block_table, block_size, spans), offsets=offsets)


class Rows(NamedTuple):
    """Rows of queries, as arrays."""

    row: Array  # of the query
    sequence: Array
    end: Array  # of the slots that the row may read
    position: Array

    def take(self, chosen: NDArray[Any]) -> Rows:
        return Rows(*(values[chosen] for values in self))


def plan_tiles(
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    num_tokens: int,
    shape: TileShape,
    spans: Spans | None = None,
) -> TilePlan:
    """Build the plan from tables in host memory; rows after the last of query_starts are padding, their results zero."""
    few, many = shape.launches()
    starts, contexts = (table.numpy().astype(np.int64) for table in (query_starts, context_lengths))
    rows = _rows(starts, contexts, spans)
    is_few = (np.diff(starts) <= few.block // shape.group)[rows.sequence]
    tables = [block_table] if spans is None else [block_table, *spans.block_tables]
    content = np.stack([table.numpy() for table in tables], -1)  # [S, W, 1, 3 or 4]
    padding = np.arange(starts[-1], num_tokens)
    return TilePlan(
        _few(rows.take(is_few), padding, content, contexts, shape, few),
        _many(rows.take(~is_few), many, many.block // shape.group),
    )


def _rows(starts: Array, contexts: Array, spans: Spans | None) -> Rows:
    row, sequence = np.arange(starts[-1]), np.repeat(np.arange(len(contexts)), np.diff(starts))
    end = (contexts - starts[1:])[sequence] + row + 1
    return Rows(row, sequence, end, end - 1 if spans is None else spans.positions.numpy()[: len(row)])


def _few(rows: Rows, padding: Array, content: Array, contexts: Array, shape: TileShape, launch: Launch) -> Tiles | None:
    """Return tiles of rows, also of different sequences, whose tables are equal over a part."""
    num_parts = -(-rows.end // SPLIT)
    merged = np.concatenate([np.stack([rows.row, num_parts], 1), np.stack([padding, 0 * padding], 1)])
    if not len(merged):
        return None
    groups = _equal_parts(content, contexts, int(num_parts.max(initial=0)), shape.block_size)  # [S, P]
    # every row in each of its parts, ordered by group
    output = np.repeat(np.arange(len(num_parts)), num_parts)
    part = np.arange(len(output)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    group = groups[rows.sequence[output], part]
    order = np.argsort(group, kind="stable")
    output, part, group = output[order], part[order], group[order]
    begins = _cuts(group, launch.block // shape.group)
    members = rows.take(output)
    end = np.minimum(members.end, (part + 1) * SPLIT)
    tables = _tables(begins, members._replace(end=end), part, output)
    return Tiles(*tables, _table(merged), max(1, int(num_parts.max(initial=0))), SPLIT, launch)


def _equal_parts(content: Array, contexts: Array, num_parts: int, block_size: int) -> Array:
    """Return a number for each part of each table, [S, P]; equal parts have equal numbers."""
    columns = np.arange(num_parts)[:, None] * SPLIT // block_size + np.arange(max(1, SPLIT // block_size))  # [P, E]
    is_used = columns < -(-contexts // block_size)[:, None, None]
    entries = np.where(is_used[..., None], content[:, np.minimum(columns, content.shape[1] - 1)], -1)
    number = np.tile(np.arange(num_parts), len(contexts))
    parts = np.column_stack([number, entries.reshape(len(number), -1)])
    hashes = (parts.astype(np.uint64) * FACTORS[: parts.shape[1]]).sum(1)
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    if not (parts == parts[first[number]]).all():  # two of 2^64 hashes are the same
        number = np.arange(len(parts))
    return number.reshape(len(contexts), num_parts)


def _many(rows: Rows, launch: Launch, size: int) -> Tiles | None:
    """Return tiles of consecutive rows of one sequence."""
    if not len(rows.row):
        return None
    begins = _cuts(rows.sequence, size)
    tables = _tables(begins, rows, 0 * rows.row, rows.row)
    return Tiles(*tables, _table(np.zeros((0, 2))), 1, WHOLE, launch)


def _cuts(group: Array, size: int) -> Array:
    """Return the begins of tiles, each of at most `size` consecutive members of one group; group [m] is per member."""
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    offset = np.arange(len(group)) - np.repeat(begins, np.diff(begins, append=len(group)))
    return np.flatnonzero(offset % size == 0)


def _tables(begins: Array, members: Rows, part: Array, output: Array) -> tuple[Tensor, Tensor]:
    """Return the records and the members of tiles that begin at these members."""
    counts = np.diff(begins, append=len(output))
    end = np.maximum.reduceat(members.end, begins) if len(begins) else begins
    records = np.stack([begins, counts, members.sequence[begins], part[begins], end], 1)
    return _table(records), _table(np.stack([members.row, output, members.position], 1))


def _table(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


def static_plan(num_rows: int, table_width: int, shape: TileShape) -> TilePlan:
    """Return a plan of `num_rows` padding rows, with the largest tables that decoding rows need, for `fill_plan`."""
    num_parts = -(-table_width * shape.block_size // SPLIT)
    rows = torch.stack([torch.arange(num_rows), torch.zeros(num_rows)], 1).to(torch.int32)
    records, members = (rows.new_zeros(num_rows * num_parts, width) for width in (5, 3))
    return TilePlan(Tiles(records, members, rows, num_parts, SPLIT, shape.launches()[0]))


def first_rows_of(plan: TilePlan, num_rows: int) -> TilePlan:
    """Return a static plan of views of the first rows of a larger one."""
    few = plan.few
    assert few is not None
    size = num_rows * few.num_parts
    return TilePlan(replace(few, records=few.records[:size], members=few.members[:size], rows=few.rows[:num_rows]))


def fill_plan(static: TilePlan, plan: TilePlan) -> None:
    """Write the plan of a decode step into a static one; the remaining rows and tiles are padding."""
    assert static.few is not None
    assert plan.few is not None
    assert plan.many is None
    for name in TABLES:
        target, values = getattr(static.few, name), getattr(plan.few, name)
        target[: len(values)].copy_(values)
    static.few.records[len(plan.few.records) :, 1] = 0
    static.few.rows[len(plan.few.rows) :, 1] = 0
