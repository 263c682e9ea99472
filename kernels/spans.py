"""Contexts that consist of several spans of tokens: which keys of a row's blocks are valid, and their positions.

A key is read if and only if it is valid and its position is at most the query's. Causal sequences are the special case in
which block w begins at position w * B and is full.

A row may see rotary keys at later positions than those to which they were rotated. The difference is the *offset* of their
block. The stored keys do not change: copies of them are rotated by the offset, or the query is rotated back by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.self_attention import rotary_angles, rotate_reference

NO_KEY = 1 << 30  # a position ahead of every query


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """The angles that rotate the keys of gathered blocks with an offset to the positions at which their row sees them."""

    blocks: Tensor  # [n], their places among all gathered blocks
    cos: Tensor  # [n, 1, rotary_dim] float32
    sin: Tensor

    def apply_(self, keys: Tensor) -> None:
        """Rotate keys [G, N, B, K] in place."""
        rotated = rotate_reference(keys[:, self.blocks].float(), self.cos, self.sin)
        keys[:, self.blocks] = rotated.to(keys.dtype)


@dataclass(frozen=True, slots=True)
class Offsets:
    """The offset of each block of each row: the position at which the row sees a key, minus that of its rotation."""

    blocks: Tensor  # [S, W] int32
    cos: Tensor  # [P, rotary_dim] float32, by offset, of which all are less than P
    sin: Tensor

    @classmethod
    def of(cls, blocks: Tensor, rotary_dim: int, theta: float, num_positions: int) -> Offsets:
        """Return offsets below `num_positions`; on a CPU, the tables of angles are as small as possible."""
        if blocks.device.type == "cpu":
            num_positions = 1 << int(blocks.max()).bit_length()
        return cls(blocks, *angle_tables(num_positions, rotary_dim, theta, blocks.device))

    def to(self, device: torch.device | str) -> Offsets:
        return Offsets(self.blocks.to(device), self.cos.to(device), self.sin.to(device))

    def select(self, sequences: Sequence[int]) -> Offsets:
        return Offsets(self.blocks[sequences].to(torch.int32).contiguous(), self.cos, self.sin)

    def rotation(self, offsets: Tensor) -> KeyRotation | None:
        """Return the rotation of blocks with these offsets [N], or None if all are 0."""
        blocks = offsets.nonzero()[:, 0]
        if not len(blocks):
            return None
        offsets = offsets[blocks].long()
        return KeyRotation(blocks, self.cos[offsets, None], self.sin[offsets, None])


@cache
def angle_tables(num_positions: int, rotary_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin [P, rotary_dim] of `rotary_angles`."""
    cos, sin = rotary_angles(torch.arange(num_positions, device=device), rotary_dim, theta)
    return cos[:, 0].contiguous(), sin[:, 0].contiguous()


@dataclass(frozen=True, slots=True)
class Spans:
    """The positions of a step's queries and of the keys in the blocks of each row of the block table."""

    positions: Tensor  # [T], of each query
    block_positions: Tensor  # [S, W], of the first key in each block, as the row sees it
    block_lengths: Tensor  # [S, W], valid keys in each block
    offsets: Offsets | None = None  # None: all are 0, or keys are not rotated

    @property
    def block_tables(self) -> list[Tensor]:
        """All tables [S, W] of the blocks: rows with equal entries for a block read the same keys at the same positions."""
        tables = [self.block_positions, self.block_lengths]
        return tables if self.offsets is None else [*tables, self.offsets.blocks]

    def to(self, device: torch.device | str) -> Spans:
        offsets = None if self.offsets is None else self.offsets.to(device)
        return Spans(self.positions.to(device), self.block_positions.to(device), self.block_lengths.to(device), offsets)

    def select(self, queries: Tensor | slice, sequences: Sequence[int]) -> Spans:
        """Return the spans of some queries and sequences, contiguous and of 32 bits."""
        tables = (self.positions[queries], self.block_positions[sequences], self.block_lengths[sequences])
        positions, block_positions, block_lengths = (table.to(torch.int32).contiguous() for table in tables)
        offsets = None if self.offsets is None else self.offsets.select(sequences)
        return Spans(positions, block_positions, block_lengths, offsets)

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
