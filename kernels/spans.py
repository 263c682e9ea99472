"""Contexts that are not one run of tokens: which keys of a row's blocks are valid, and at which positions they are.

A key is read if and only if it is valid and its position is at most the query's. Causal sequences are the special case in
which block w begins at position w * B and is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_KEY = 1 << 30  # a position ahead of every query


@dataclass(frozen=True, slots=True)
class Spans:
    """The positions of a step's queries and of the keys in the blocks of each row of the block table."""

    positions: Tensor  # [T], of each query
    block_positions: Tensor  # [S, W], of the first key in each block
    block_lengths: Tensor  # [S, W], valid keys in each block

    def to(self, device: torch.device | str) -> Spans:
        return Spans(*(table.to(device) for table in (self.positions, self.block_positions, self.block_lengths)))

    def select(self, queries: Tensor | slice, sequences: Sequence[int]) -> Spans:
        """Return those of some queries and sequences, contiguous and of 32 bits."""
        tables = (self.positions[queries], self.block_positions[sequences], self.block_lengths[sequences])
        return Spans(*(table.to(torch.int32).contiguous() for table in tables))

    def keys(self, columns: Tensor | slice, block_size: int) -> tuple[Tensor, Tensor]:
        """Return for each sequence the positions of the slots in some columns of its table, and which hold no valid key.

        Both are [S, C].
        """
        offsets = torch.arange(block_size, device=self.block_positions.device)
        positions = self.block_positions[:, columns, None] + offsets
        is_empty = offsets >= self.block_lengths[:, columns, None]
        return positions.flatten(1), is_empty.flatten(1)


def slot_positions(block_table: Tensor, block_size: int, spans: Spans | None) -> Tensor:
    """Return int32 [S, W * B]: the position of the key in each slot of each row, or `NO_KEY`.

    Without spans, the positions are those of plain sequences, one row of memory for all of them.
    """
    if spans is None:
        slots = torch.arange(block_table.shape[1] * block_size, dtype=torch.int32, device=block_table.device)
        return slots.expand(len(block_table), -1)
    positions, is_empty = spans.keys(slice(None), block_size)
    return positions.to(torch.int32).masked_fill(is_empty, NO_KEY)


def plain_tables(block_table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the positions and lengths [S, W] of the blocks of plain sequences."""
    positions = torch.arange(block_table.shape[1], dtype=torch.int32, device=block_table.device) * block_size
    return positions.repeat(len(block_table), 1), torch.full_like(block_table, block_size)
