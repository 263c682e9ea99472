"""Tiles of paged attention on a GPU: which rows meet which keys in one program, decided on the host once per step.

A run of few new tokens of a sequence is cut into parts of SPLIT slots by their index in its block table. Rows whose tables
are equal over a part are served by one tile, whether they have a prefix, a shot in the same place or all of it in common.
The cuts depend on nothing but the run, so a row's result is bit for bit the same next to any neighbours. A run of many new
tokens is cut into tiles of consecutive rows, each over all slots up to its last row.

A recorded step reads the tables from buffers of a fixed size, in which tiles of no rows follow the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from kernels.backend import Launch, launch_config
from kernels.spans import Spans, slot_positions

# One sequence of 1,000 tokens and 32 heads gives 128 programs, about one per core of an H100.
SPLIT = 256
WHOLE = 1 << 30
TABLES = ("records", "members", "rows")
Ints: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model and its cache that decide how rows are cut into tiles."""

    block_size: int
    group: int  # query heads per key head
    head_dim: int
    dtype: torch.dtype

    def launches(self) -> tuple[Launch, Launch]:
        """Return those for few and for many tokens. Raises `ValueError` if a group of heads does not fit into a tile."""
        few, many = (launch_config(name, self.head_dim, self.dtype) for name in ("paged_decode", "paged_prefill"))
        block = min(few.block, many.block)
        if self.group > block:
            raise ValueError(f"{self.group} query heads per key head do not fit into a tile of {block} rows")
        return few, many


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tables that the programs of one launch read, all int32."""

    records: Tensor  # [n, 5]: first member, number of members, sequence whose table is read, part, end of its slots
    members: Tensor  # [m, 3]: row, row of the output, position
    rows: Tensor  # [R, 2]: row, number of its parts, which are summed at the end; none if every tile is over all slots
    num_parts: int  # of the longest row that fits
    split: int
    launch: Launch

    def to(self, device: torch.device) -> Tiles:
        """Return them on a device, without waiting for a GPU."""
        tables = {name: getattr(self, name) for name in TABLES}
        if device.type == "cuda":
            tables = {name: table.pin_memory() for name, table in tables.items()}
        return replace(self, **{name: table.to(device, non_blocking=True) for name, table in tables.items()})


@dataclass(frozen=True, slots=True)
class Plan:
    """The tiles of one step: of runs of few tokens, in parts, and of runs of many tokens."""

    few: Tiles | None
    many: Tiles | None = None
    keys: Tensor | None = None  # [S, W * B], the position of the key in each slot, made on the device

    def to(self, device: torch.device) -> Plan:
        few, many = (None if tiles is None else tiles.to(device) for tiles in (self.few, self.many))
        return Plan(few, many)

    def over(self, block_table: Tensor, block_size: int, spans: Spans | None) -> Plan:
        """Return the plan with the positions of keys, from tables on the device: the host waits for nothing."""
        return replace(self, keys=slot_positions(block_table, block_size, spans))


@dataclass(frozen=True, slots=True)
class Run:
    """The rows of one sequence."""

    sequence: int
    first: int
    count: int
    context: int  # slots up to the last row's
    positions: Sequence[int]

    def end(self, index: int) -> int:
        """Return the end of the slots that one of its rows may read."""
        return self.context - self.count + index + 1


def plan_tiles(
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    num_tokens: int,
    shape: Shape,
    spans: Spans | None = None,
) -> Plan:
    """Build the plan from tables in host memory; rows after the last of query_starts are padding and give zeros."""
    few, many = shape.launches()
    starts = query_starts.tolist()
    runs = list(_runs(starts, context_lengths.tolist(), spans))
    short = [run for run in runs if run.count <= few.block // shape.group]
    long = [run for run in runs if run.count > few.block // shape.group]
    parts = _tiles_of_parts(short, block_table, spans, shape, few)
    rows = [(run.first + i, cdiv(run.end(i), SPLIT)) for run in short for i in range(run.count)]
    rows += [(row, 0) for row in range(starts[-1], num_tokens)]
    num_parts = max((count for _, count in rows), default=0)
    return Plan(
        Tiles(*parts, _table(rows, 2), max(num_parts, 1), SPLIT, few) if rows else None,
        Tiles(*_tiles_of_rows(long, many.block // shape.group), _table([], 2), 1, WHOLE, many) if long else None,
    )


def _runs(starts: list[int], contexts: list[int], spans: Spans | None) -> Iterator[Run]:
    positions = None if spans is None else spans.positions.tolist()
    for sequence, ((first, end), context) in enumerate(zip(pairwise(starts), contexts, strict=True)):
        count = end - first
        if count:
            indices = range(context - count, context)
            yield Run(sequence, first, count, context, indices if positions is None else positions[first:end])


def _tiles_of_parts(
    runs: list[Run], block_table: Tensor, spans: Spans | None, shape: Shape, launch: Launch
) -> tuple[Tensor, Tensor]:
    """Return the records and members of tiles of rows, of any runs, whose tables are equal over a part."""
    tables = [block_table] if spans is None else [block_table, spans.block_positions, spans.block_lengths]
    content = torch.stack([table.to(torch.int32) for table in tables], -1).numpy()  # [S, W, 1 or 3]
    groups: dict[tuple[int, bytes], list[Ints]] = {}
    num_rows = 0
    for run in runs:
        for part, begin in enumerate(range(0, run.context, SPLIT)):
            end = min(run.context, begin + SPLIT)
            blocks = content[run.sequence, begin // shape.block_size : cdiv(end, shape.block_size)]
            group = groups.setdefault((part, blocks.tobytes()), [])
            group += [
                (run.first + i, num_rows + i, position, run.sequence, min(run.end(i), end))
                for i, position in enumerate(run.positions)
                if run.end(i) > begin
            ]
        num_rows += run.count
    records: list[Ints] = []
    members: list[Ints] = []
    size = launch.block // shape.group
    for (part, _), group in groups.items():
        for first in range(0, len(group), size):
            tile = group[first : first + size]
            records.append((len(members), len(tile), tile[0][3], part, max(member[4] for member in tile)))
            members += [member[:3] for member in tile]
    return _table(records, 5), _table(members, 3)


def _tiles_of_rows(runs: list[Run], size: int) -> tuple[Tensor, Tensor]:
    """Return the records and members of tiles of consecutive rows of one run."""
    records: list[Ints] = []
    members: list[Ints] = []
    for run in runs:
        for first in range(0, run.count, size):
            count = min(size, run.count - first)
            records.append((len(members), count, run.sequence, 0, run.end(first + count - 1)))
            members += [(run.first + i, run.first + i, run.positions[i]) for i in range(first, first + count)]
    return _table(records, 5), _table(members, 3)


def _table(values: Sequence[Ints], width: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).view(len(values), width)


def cdiv(count: int, size: int) -> int:
    return -(-count // size)


def static_plan(num_rows: int, table_width: int, shape: Shape, device: torch.device) -> Plan:
    """Return a plan of `num_rows` decoding rows of padding, as large as any of theirs, which `fill_plan` overwrites."""
    num_parts = cdiv(table_width * shape.block_size, SPLIT)
    rows = torch.stack([torch.arange(num_rows), torch.zeros(num_rows)], 1).to(device, torch.int32)
    records, members = (rows.new_zeros(num_rows * num_parts, width) for width in (5, 3))
    return Plan(Tiles(records, members, rows, num_parts, SPLIT, shape.launches()[0]))


def first_rows_of(plan: Plan, num_rows: int) -> Plan:
    """Return a static plan of views of the first rows of a larger one."""
    few = plan.few
    assert few is not None
    size = num_rows * few.num_parts
    return Plan(replace(few, records=few.records[:size], members=few.members[:size], rows=few.rows[:num_rows]))


def fill_plan(static: Plan, plan: Plan) -> None:
    """Write the plan of a step of decoding rows into a static one; the rows and tiles after it are padding."""
    assert static.few is not None
    assert plan.few is not None
    assert plan.many is None
    for name in TABLES:
        target, values = getattr(static.few, name), getattr(plan.few, name)
        target[: len(values)].copy_(values)
    static.few.records[len(plan.few.records) :, 1] = 0
    static.few.rows[len(plan.few.rows) :, 1] = 0
