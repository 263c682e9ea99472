"""Likelihood ranking scores candidates after a query by their log-probabilities, after several prefixes of one prompt.

The prompt's shots run once; queries and candidates branch off after any of them. A key-value block holds a single token
here, so a branch's block table lists its prefix's tokens and then its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from model.batch import Batch, KVCache, MediaPages
from model.flamingo import Flamingo
from model.prompt import PromptTokenizer, Segment
from training.examples import encode_segment


@dataclass(frozen=True, slots=True)
class PagedTokens:
    """Tokens and the page that each of them reads, -1 for none."""

    token_ids: list[int]
    pages: list[int]


def encode_segments(segments: Sequence[Segment], tokenizer: PromptTokenizer, page: int) -> PagedTokens:
    """Encode segments whose tokens all read the same page."""
    ids = [token for segment in segments for token in encode_segment(segment, tokenizer)]
    return PagedTokens(ids, [page] * len(ids))


def concatenate(parts: Sequence[PagedTokens]) -> PagedTokens:
    return PagedTokens([token for p in parts for token in p.token_ids], [page for p in parts for page in p.pages])


@dataclass(frozen=True, slots=True)
class Branch:
    """A query and a candidate after the first `prefix_length` tokens of the prefix; the candidate's tokens are scored."""

    prefix_length: int
    query: PagedTokens
    candidate: PagedTokens


class Ranker:
    def __init__(self, model: Flamingo, media: MediaPages) -> None:
        self.model, self.media = model, media
        self._dtype = next(model.language_model.parameters()).dtype

    @torch.inference_mode()
    def scores(self, prefix: PagedTokens, branches: Sequence[Branch]) -> list[float]:
        """Return the sum of the candidate's log-probabilities for each branch."""
        lengths = [len(b.query.token_ids) + len(b.candidate.token_ids) for b in branches]
        cache = KVCache.zeros(self.model.config, len(prefix.token_ids) + sum(lengths), 1, self._dtype, "cpu")
        if prefix.token_ids:
            self.model(_prefix_batch(prefix), cache, self.media)
        logits = self.model(_branch_batch(len(prefix.token_ids), branches, lengths), cache, self.media).float()
        rows = logits.log_softmax(-1).split([len(b.candidate.token_ids) for b in branches])
        return [
            float(part.gather(1, torch.tensor(b.candidate.token_ids)[:, None]).sum())
            for part, b in zip(rows, branches, strict=True)
        ]


def _prefix_batch(prefix: PagedTokens) -> Batch:
    length = len(prefix.token_ids)
    positions = torch.arange(length)
    return Batch(
        token_ids=torch.tensor(prefix.token_ids),
        positions=positions,
        media_slot=_slots(prefix.pages),
        query_starts=torch.tensor([0, length], dtype=torch.int32),
        last_token=positions[-1:],
        context_lengths=torch.tensor([length], dtype=torch.int32),
        block_table=positions[None].to(torch.int32),
        slot_mapping=positions,
    )


def _slots(pages: Sequence[int]) -> Tensor | None:
    """Return the media slots, or None if no token reads a media item, so that the gated layers skip their attention."""
    return torch.tensor(pages, dtype=torch.int32) if any(page >= 0 for page in pages) else None


def _branch_batch(num_prefix_tokens: int, branches: Sequence[Branch], lengths: Sequence[int]) -> Batch:
    starts = list(accumulate(lengths, initial=0))
    contexts = [b.prefix_length + count for b, count in zip(branches, lengths, strict=True)]
    table = torch.zeros(len(branches), max(contexts), dtype=torch.int32)
    for row, (branch, first, count) in enumerate(zip(branches, starts, lengths, strict=False)):
        blocks = [*range(branch.prefix_length), *range(num_prefix_tokens + first, num_prefix_tokens + first + count)]
        table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    ids = [token for b in branches for token in (*b.query.token_ids, *b.candidate.token_ids)]
    pages = [page for b in branches for page in (*b.query.pages, *b.candidate.pages)]
    positions = [b.prefix_length + n for b, count in zip(branches, lengths, strict=True) for n in range(count)]
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
        slot_mapping=num_prefix_tokens + torch.arange(len(ids)),
    )
