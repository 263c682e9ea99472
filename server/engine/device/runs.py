"""The runs of a step's rows: consecutive tokens that attend to the same blocks.

A plain sequence's part of a step is one run. Where shots attend alone, each span has a run of its own: the prefix, every
shot after the prefix, and the query after all of them. Where tokens are proposed, each token has one, and is computed as in
a step of its own. All can be in one step, since a layer stores a token's keys and values before later tokens read any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from server.engine.caches.spans import Layout, Part
from server.engine.plan import Row


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens of one row at these positions, and the blocks that they read: those of other spans, then of their own.

    The first token is number `first` of its own span. For the blocks of other spans, `before_positions` has the position of
    the first token of each, `before_lengths` how many tokens are in each, and `before_offsets` by how much that position is
    after the one for which they were computed.
    """

    positions: range
    first: int
    table: list[int]
    before_positions: Sequence[int] = ()
    before_lengths: Sequence[int] = ()
    before_offsets: Sequence[int] = ()

    @property
    def count(self) -> int:
        return len(self.positions)

    def num_slots(self, block_size: int) -> int:
        """Return the slots of the table up to the last token."""
        return len(self.before_lengths) * block_size + self.first + len(self.positions)

    def slots(self, block_size: int) -> Iterator[int]:
        """Return where the keys and values of each token are stored."""
        first_slot = len(self.before_lengths) * block_size + self.first
        for at in range(first_slot, first_slot + len(self.positions)):
            yield self.table[at // block_size] * block_size + at % block_size

    def block_positions(self, block_size: int) -> list[int]:
        start = self.positions.start - self.first
        num_own = len(self.table) - len(self.before_positions)
        return [*self.before_positions, *range(start, start + num_own * block_size, block_size)]

    def block_lengths(self, block_size: int) -> list[int]:
        """Return the valid tokens of each block; the run's own count as full, as the later ones come after its tokens."""
        return [*self.before_lengths, *[block_size] * (len(self.table) - len(self.before_lengths))]

    def block_offsets(self) -> list[int]:
        return [*self.before_offsets, *[0] * (len(self.table) - len(self.before_offsets))]


def runs_of(rows: Iterable[Row]) -> Iterator[Run]:
    for row in rows:
        layout, table = row.sequence.layout, row.sequence.block_table
        for start, stop in pairwise(range(row.start, row.end + 1)) if row.proposed else [(row.start, row.end)]:
            if layout is None:
                yield Run(range(start, stop), start, table)
            else:
                yield from (_run(layout, table, part) for part in layout.parts(start, stop))


def _run(layout: Layout, table: list[int], part: Part) -> Run:
    """Return the run of a part: of the query after all other spans, of a shot after the prefix, or of the prefix."""
    span, first = part.span, part.start - layout.starts[part.span]
    is_query = span == len(layout.starts) - 1
    num_before = layout.first_query_block if is_query else min(span, 1) * layout.num_prefix_blocks
    blocks = table[layout.first_query_block :] if is_query else [table[block] for block in layout.blocks(span)]
    position = layout.positions[span] + first
    return Run(
        range(position, position + part.stop - part.start),
        first,
        table[:num_before] + blocks,
        layout.block_positions[:num_before],
        layout.block_lengths[:num_before],
        layout.block_offsets[:num_before],
    )
