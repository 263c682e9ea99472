"""Contexts that are not one run of tokens: which keys of a row's blocks are valid, and at which positions they are.

A key is read if and only if it is valid and its position is at most the query's. Causal sequences are the special case in
which block w begins at position w * B and is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


def plain_spans(block_table: Tensor, block_size: int) -> Spans:
    """Return the blocks of sequences of one run of tokens each: one row of tables for all of them, and no queries."""
    positions = torch.arange(block_table.shape[1], dtype=torch.int32, device=block_table.device) * block_size
    lengths = torch.full_like(positions, block_size)
    return Spans(positions[:0], positions.expand(block_table.shape), lengths.expand(block_table.shape))
