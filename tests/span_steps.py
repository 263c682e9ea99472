"""Steps of rows whose contexts are spans, drawn at random: prefixes and shots that rows share, and plain rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.spans import Offsets, Spans


@dataclass(frozen=True)
class Span:
    """Some tokens from a position on; spans of one name are the same blocks, those without a name a row's own.

    A row sees them `offset` later.
    """

    first: int
    count: int
    name: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class Row:
    spans: tuple[Span, ...]
    num_queries: int

    def in_a_row(self) -> Row:
        """Return the row with each span where the one before it ends."""
        ends = accumulate((span.count for span in self.spans), initial=0)
        *spans, last = (replace(span, offset=end - span.first) for span, end in zip(self.spans, ends, strict=False))
        return Row((*spans, replace(last, first=last.first + last.offset, offset=0)), self.num_queries)


@dataclass(frozen=True)
class Step:
    """The inputs of the attention; in the cache, everything but valid keys and values is NaN.

    The last block of every second row counts as full: its other slots are ahead of the queries.
    """

    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    spans: Spans

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.kv_cache, self.block_table, self.query_starts, self.context_lengths

    def row(self, index: int) -> Step:
        """Return the step of one of its rows alone, with a table of its own width."""
        first, end = self.query_starts[index : index + 2].tolist()
        rows, width = slice(index, index + 1), -(-int(self.context_lengths[index]) // self.kv_cache.shape[3])
        tables = (x[rows, :width] for x in (self.block_table, *self.spans.block_tables))
        table, block_positions, block_lengths, *offsets = (x.contiguous() for x in tables)
        return replace(
            self,
            query=self.query[first:end],
            block_table=table,
            query_starts=torch.tensor([0, end - first], dtype=torch.int32),
            context_lengths=self.context_lengths[rows],
            spans=Spans(
                self.spans.positions[first:end],
                block_positions,
                block_lengths,
                self.spans.offsets and replace(self.spans.offsets, blocks=offsets[0]),
            ),
        )


@st.composite
def span_rows(draw: st.DrawFn, *, max_rows: int = 5, max_queries: int = 9, unit: int = 1) -> list[Row]:
    """Draw rows of the longest spans of 9 * `unit` tokens; several have the same prefix and shots, in any order.

    Some rows see their spans in a row.
    """
    prefixes = [Span(0, unit * draw(st.integers(0, 5)), f"prefix {i}") for i in range(2)]
    lengths = [[unit * draw(st.integers(1, 9)) for _ in range(3)] for _ in prefixes]
    shots = [
        [Span(prefix.count, count, f"shot {i}.{j}") for j, count in enumerate(counts)]
        for i, (prefix, counts) in enumerate(zip(prefixes, lengths, strict=True))
    ]
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        length = draw(st.integers(1, 9))
        if draw(st.integers(0, 3)) == 0:
            spans: tuple[Span, ...] = (Span(0, unit * length),)
        else:
            group = draw(st.integers(0, 1))
            read = [prefixes[group]] * bool(prefixes[group].count) + draw(
                st.lists(st.sampled_from(shots[group]), max_size=4)
            )
            spans = (*read, Span(max([span.first + span.count for span in read], default=0), length))
        row = Row(spans, draw(st.integers(0, min(length, max_queries))))
        rows.append(row.in_a_row() if draw(st.booleans()) else row)
    return rows


@st.composite
def candidate_rows(draw: st.DrawFn) -> list[Row]:
    """Draw candidates after one or two prompts, and other rows among them."""
    rows: list[Row] = []
    for row in draw(span_rows(max_rows=3)):
        *spans, query = row.spans
        rows.append(row)
        for _ in range(draw(st.integers(0, 4))):
            length = draw(st.integers(1, 9))
            rows.append(Row((*spans, replace(query, count=length)), draw(st.integers(1, length))))
    return rows


def step_of(
    rows: list[Row],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    spare_columns: int = 1,
    rotary_dim: int = 0,
) -> Step:
    """Return a step of these rows; `rotary_dim`: the elements of keys that are rotated where a row sees them later."""
    blocks: dict[object, list[tuple[int, int, int]]] = {}  # by span: number, first position and length of its blocks
    num_blocks = 1  # block 0 pads the tables
    for i, row in enumerate(rows):
        for span in row.spans:
            key = span.name or i
            if key not in blocks:
                block_starts = range(0, span.count, block_size)
                blocks[key] = [
                    (num_blocks + j, span.first + at, min(block_size, span.count - at))
                    for j, at in enumerate(block_starts)
                ]
                num_blocks += len(block_starts)
    tables = [
        [
            (block, position + span.offset, count, span.offset)
            for span in row.spans
            for block, position, count in blocks[span.name or i]
        ]
        for i, row in enumerate(rows)
    ]
    width = spare_columns + max(map(len, tables))
    padded = [table + [(0, 0, 0, 0)] * (width - len(table)) for table in tables]
    block_table, block_positions, block_lengths, offsets = torch.tensor(padded, dtype=torch.int32).unbind(2)
    for i, table in enumerate(tables[1::2]):
        block_lengths[2 * i + 1, len(table) - 1] = block_size
    number = torch.randperm(num_blocks - 1) + 1
    kv_cache = torch.full((num_blocks, 2, kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    for table in tables:
        for block, _, count, _ in table:
            kv_cache[number[block - 1], :, :, :count] = torch.randn(2, kv_heads, count, head_dim).to(dtype)
    ends = [row.spans[-1].first + row.spans[-1].count for row in rows]
    positions = [at for row, end in zip(rows, ends, strict=True) for at in range(end - row.num_queries, end)]
    starts = torch.tensor([0, *(row.num_queries for row in rows)]).cumsum(0).int()
    fused = torch.randn(len(positions), heads + 2 * kv_heads, head_dim).to(dtype)  # as a projection gives it
    return Step(
        fused[:, :heads],
        kv_cache,
        torch.cat([torch.zeros(1, dtype=torch.long), number]).int()[block_table.long()],
        starts,
        torch.tensor([(len(table) - 1) * block_size + table[-1][2] for table in tables]).int(),
        Spans(
            torch.tensor(positions, dtype=torch.int64),
            block_positions.contiguous(),
            block_lengths.contiguous(),
            Offsets.of(offsets.contiguous(), rotary_dim, 1e4, 0) if rotary_dim else None,
        ),
    )
