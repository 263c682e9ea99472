"""Contexts that are not one run of tokens: which keys of a row's blocks are valid, and at which positions they are.

A key is read if and only if it is valid and its position is at most the query's. Causal sequences are the special case in
which block w begins at position w * B and is full.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Spans:
    """The positions of a step's queries and of the keys in the blocks of each row of the block table."""

    positions: Tensor  # [T], of each query
    block_positions: Tensor  # [S, W], of the first key in each block
    block_lengths: Tensor  # [S, W], valid keys in each block

    def of_keys(self, row: int, num_keys: int, block_size: int) -> Tensor:
        """Return the positions [C] of the first `num_keys` slots of a row, -1 where no valid key is."""
        offsets = torch.arange(block_size, device=self.block_positions.device)
        positions = self.block_positions[row, :, None].long() + offsets
        valid = offsets < self.block_lengths[row, :, None]
        return positions.where(valid, -1).flatten()[:num_keys]
