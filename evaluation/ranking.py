"""Likelihood ranking: the log-probability of every candidate behind a query, at several lengths of one prompt of shots.

The shots are run once; queries and candidates branch off behind any of them. A key-value block holds a single token here,
so that a branch is a table that names its prefix's tokens and then its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from model.batch import Batch, KVCache, MediaPages
from model.flamingo import Flamingo


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens, and the page that each of them reads; -1: none."""

    token_ids: list[int]
    pages: list[int]


@dataclass(frozen=True, slots=True)
class Branch:
    """Behind the first `behind` tokens of the prefix: a query, then a candidate, whose tokens are scored."""

    behind: int
    query: Piece
    candidate: Piece


class Ranker:
    def __init__(self, model: Flamingo, media: MediaPages) -> None:
        self.model, self.media = model, media
        self._dtype = next(model.language_model.parameters()).dtype

    @torch.inference_mode()
    def scores(self, prefix: Piece, branches: Sequence[Branch]) -> list[float]:
        """The sum of the candidate's log-probabilities, for each branch."""
        own = [len(b.query.token_ids) + len(b.candidate.token_ids) for b in branches]
        cache = KVCache.zeros(self.model.config, len(prefix.token_ids) + sum(own), 1, self._dtype, "cpu")
        if prefix.token_ids:
            self.model(_prefix_batch(prefix), cache, self.media)
        logits = self.model(_branch_batch(len(prefix.token_ids), branches, own), cache, self.media).float()
        rows = logits.log_softmax(-1).split([len(b.candidate.token_ids) for b in branches])
        return [
            float(part.gather(1, torch.tensor(b.candidate.token_ids)[:, None]).sum())
            for part, b in zip(rows, branches, strict=True)
        ]


def _prefix_batch(prefix: Piece) -> Batch:
    length = len(prefix.token_ids)
    places = torch.arange(length)
    return Batch(
        token_ids=torch.tensor(prefix.token_ids),
        positions=places,
        media_slot=_slots(prefix.pages),
        query_starts=torch.tensor([0, length], dtype=torch.int32),
        last_token=places[-1:],
        context_lengths=torch.tensor([length], dtype=torch.int32),
        block_table=places[None].to(torch.int32),
        slot_mapping=places,
    )


def _slots(pages: Sequence[int]) -> Tensor | None:
    """None where no token reads a media: the gated layers' attention is then left out."""
    return torch.tensor(pages, dtype=torch.int32) if any(page >= 0 for page in pages) else None


def _branch_batch(prefix_length: int, branches: Sequence[Branch], own: Sequence[int]) -> Batch:
    starts = list(accumulate(own, initial=0))
    contexts = [b.behind + count for b, count in zip(branches, own, strict=True)]
    table = torch.zeros(len(branches), max(contexts), dtype=torch.int32)
    for row, (branch, first, count) in enumerate(zip(branches, starts, own, strict=False)):
        blocks = [*range(branch.behind), *range(prefix_length + first, prefix_length + first + count)]
        table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    ids = [token for b in branches for token in (*b.query.token_ids, *b.candidate.token_ids)]
    pages = [page for b in branches for page in (*b.query.pages, *b.candidate.pages)]
    positions = [b.behind + n for b, count in zip(branches, own, strict=True) for n in range(count)]
    # a candidate's token is predicted from the row before it
    scored = [
        first + len(b.query.token_ids) - 1 + n
        for b, first in zip(branches, starts, strict=False)
        for n in range(len(b.candidate.token_ids))
    ]
    return Batch(
        token_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        media_slot=_slots(pages),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        last_token=torch.tensor(scored),
        context_lengths=torch.tensor(contexts, dtype=torch.int32),
        block_table=table,
        slot_mapping=prefix_length + torch.arange(len(ids)),
    )
