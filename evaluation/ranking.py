"""Ranks candidates after a query by their log-probabilities, after any number of a prompt's shots.

The shots are computed once; queries and candidates are branches after some of them. A key-value block holds a single token
here, so a branch's block table lists the tokens of its shots and then its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch

from model.batch import Batch, KVCache, MediaPages
from model.config import AlonePositions
from model.flamingo import Flamingo
from model.prompt import PromptTokenizer, Segment, ShotsAttend
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
    """A query and a candidate after the first `num_shots` shots; the candidate's tokens are scored."""

    num_shots: int
    query: PagedTokens
    candidate: PagedTokens

    @property
    def num_tokens(self) -> int:
        return len(self.query.token_ids) + len(self.candidate.token_ids)


class SeenToken(NamedTuple):
    """The position at which a query sees a token, and its distance from the position at which it was computed."""

    position: int
    offset: int


class Ranker:
    """Scores candidates; `shots_attend` as in `model.prompt.EncodedPrompt`, without a prefix.

    `alone_positions` replaces that of the model. Raises `ConfigError` for positions that the model does not support.
    """

    def __init__(
        self,
        model: Flamingo,
        media: MediaPages,
        shots_attend: ShotsAttend = "previous",
        alone_positions: AlonePositions | None = None,
    ) -> None:
        self.model, self.media = model, media
        self._attend_alone = shots_attend == "alone"
        config = model.config.language_model
        checked = replace(config, alone_positions=alone_positions or config.alone_positions)
        self._is_row = checked.alone_positions == "in_a_row"
        self._dtype = next(model.language_model.parameters()).dtype

    @torch.inference_mode()
    def scores(self, shots: Sequence[PagedTokens], branches: Sequence[Branch]) -> list[float]:
        """Return the sum of the candidate's log-probabilities for each branch."""
        num_tokens = sum(len(shot.token_ids) for shot in shots)
        num_slots = num_tokens + sum(branch.num_tokens for branch in branches)
        cache = KVCache.zeros(self.model.config, num_slots, 1, self._dtype, "cpu")
        if shots:
            self.model(self._shots_batch(shots), cache, self.media)
        logits = self.model(self._branch_batch(shots, branches), cache, self.media).float()
        rows = logits.log_softmax(-1).split([len(b.candidate.token_ids) for b in branches])
        return [
            float(part.gather(1, torch.tensor(b.candidate.token_ids)[:, None]).sum())
            for part, b in zip(rows, branches, strict=True)
        ]

    def _shots_batch(self, shots: Sequence[PagedTokens]) -> Batch:
        """Return a step of all shots: each as its own sequence, or all as one."""
        lengths = [len(shot.token_ids) for shot in shots]
        lengths = lengths if self._attend_alone else [sum(lengths)]
        starts = list(accumulate(lengths, initial=0))
        return _batch(
            shots,
            runs=[range(length) for length in lengths],
            tables=[range(first, end) for first, end in pairwise(starts)],
            first_slot=0,
            last_token=[starts[-1] - 1],
        )

    def _branch_batch(self, shots: Sequence[PagedTokens], branches: Sequence[Branch]) -> Batch:
        """Return a step of all branches, in which the rows before the tokens of candidates are scored."""
        ends = list(accumulate((len(shot.token_ids) for shot in shots), initial=0))
        starts = list(accumulate((branch.num_tokens for branch in branches), initial=ends[-1]))
        origins = [self._origin(shots[: branch.num_shots]) for branch in branches]
        scored = [
            first - ends[-1] + len(branch.query.token_ids) - 1 + n
            for branch, first in zip(branches, starts, strict=False)
            for n in range(len(branch.candidate.token_ids))
        ]
        return _batch(
            [part for branch in branches for part in (branch.query, branch.candidate)],
            runs=[range(origin, origin + b.num_tokens) for origin, b in zip(origins, branches, strict=True)],
            tables=[
                [*range(ends[branch.num_shots]), *range(first, end)]
                for branch, (first, end) in zip(branches, pairwise(starts), strict=True)
            ],
            first_slot=ends[-1],
            last_token=scored,
            shots=self._seen(shots) if self._attend_alone else None,
        )

    def _origin(self, shots: Sequence[PagedTokens]) -> int:
        """Return the position of a query's first token: after all shots, or after the longest."""
        lengths = [len(shot.token_ids) for shot in shots]
        return max(lengths, default=0) if self._attend_alone and not self._is_row else sum(lengths)

    def _seen(self, shots: Sequence[PagedTokens]) -> list[SeenToken]:
        """Return the positions at which queries see tokens of shots that attend alone and are computed from position 0."""
        ends = accumulate((len(shot.token_ids) for shot in shots), initial=0)
        offsets = [end if self._is_row else 0 for end in ends]
        return [
            SeenToken(offset + position, offset)
            for offset, shot in zip(offsets, shots, strict=False)
            for position in range(len(shot.token_ids))
        ]


def _batch(
    parts: Sequence[PagedTokens],
    runs: Sequence[range],
    tables: Sequence[Sequence[int]],
    first_slot: int,
    last_token: Sequence[int],
    shots: Sequence[SeenToken] | None = None,
) -> Batch:
    """Return a batch of sequences at the positions `runs`, whose keys are in the slots `tables`, own tokens last.

    `shots`: the tokens of shots that attend alone, which come first in the tables.
    """
    tokens = concatenate(parts)
    table = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
    for row, slots in zip(table, tables, strict=True):
        row[: len(slots)] = torch.tensor(slots, dtype=torch.int32)
    positions = lengths = offsets = None
    if shots is not None:
        positions, lengths, offsets = (torch.zeros_like(table) for _ in range(3))
        for row, (run, slots) in enumerate(zip(runs, tables, strict=True)):
            seen = [*shots[: len(slots) - len(run)], *(SeenToken(position, 0) for position in run)]
            positions[row, : len(slots)], offsets[row, : len(slots)] = torch.tensor(seen, dtype=torch.int32).T
            lengths[row, : len(slots)] = 1
    return Batch(
        token_ids=torch.tensor(tokens.token_ids),
        positions=torch.tensor(list(chain.from_iterable(runs))),
        # None if no token reads a media item, so that the gated layers skip their attention
        media_slot=torch.tensor(tokens.pages, dtype=torch.int32) if max(tokens.pages, default=-1) >= 0 else None,
        query_starts=torch.tensor([0, *accumulate(map(len, runs))], dtype=torch.int32),
        last_token=torch.tensor(last_token),
        context_lengths=torch.tensor([len(slots) for slots in tables], dtype=torch.int32),
        block_table=table,
        block_positions=positions,
        block_lengths=lengths,
        block_offsets=offsets if offsets is not None and offsets.any() else None,
        slot_mapping=first_slot + torch.arange(len(tokens.token_ids)),
    )
