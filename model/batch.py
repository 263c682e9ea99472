"""What one forward sees: packed tokens of any mix of sequences, and the lengths beside them. No padding, no hidden state.

Two sequences, one prefilling five tokens and one decoding its 8th: token_ids has T = 6 entries, query_starts is
[0, 5, 6], context_lengths is [5, 8], and block_table's rows name the blocks that hold each one's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, place in the token's own sequence
    # [T] int32, the media page that the token reads, -1 none; [T, J] for "all previous images". None: no token reads any
    media_slot: Tensor | None
    query_starts: Tensor  # [S + 1] int32, first row of each sequence
    last_token: Tensor  # [W] int64, the rows whose logits are wanted
    # with a K/V cache only
    context_lengths: Tensor | None = None  # [S] int32, tokens of each sequence, this step's included
    block_table: Tensor | None = None  # [S, B] int32
    slot_mapping: Tensor | None = None  # [T] int64, block * block_size + offset where each token's K/V goes
    num_shared_blocks: int = 0  # so many blocks in front are the same in every row of block_table


def whole_sequences(
    token_ids: list[list[int]], media_slot: list[list[int]] | list[list[list[int]]], device: torch.device | str = "cpu"
) -> Batch:
    """Sequences from their first token on, for a forward with no cache; the logits of every token are wanted."""
    lengths = torch.tensor([0] + [len(ids) for ids in token_ids])
    starts = lengths.cumsum(0)
    return Batch(
        token_ids=torch.tensor([t for ids in token_ids for t in ids], device=device),
        positions=torch.cat([torch.arange(len(ids)) for ids in token_ids]).to(device),
        media_slot=torch.tensor([s for slots in media_slot for s in slots], dtype=torch.int32, device=device),
        query_starts=starts.to(torch.int32).to(device),
        last_token=torch.arange(int(starts[-1]), device=device),
    )
