"""Packs sequences into forwards without padding; logits are computed only for target tokens.

A media item that occurs in several sequences of a batch is encoded once, as one page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.batch import Batch, whole_sequences
from model.config import AlonePositions
from training.examples import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """A packed batch with its targets and media.

    `media` holds one entry per page, in the pages' order: pixels [F, 3, h, w] or cached features [F, P, Dv].
    """

    batch: Batch
    targets: Tensor  # [W] int64, the token that follows each row of `batch.last_token`
    media: tuple[Tensor, ...]
    names: Tensor  # [N] int64, the rows at which an image's name begins

    @property
    def num_targets(self) -> int:
        return len(self.targets)


def pack(sequences: Iterable[Tokens], max_tokens: int) -> list[list[Tokens]]:
    """Group sequences, in their order, into packs of at most `max_tokens` tokens."""
    packs: list[list[Tokens]] = []
    num_free = 0
    for sequence in sequences:
        if not packs or len(sequence.token_ids) > num_free:
            packs.append([])
            num_free = max_tokens
        packs[-1].append(sequence)
        num_free -= len(sequence.token_ids)
    return packs


def collate(
    sequences: Sequence[Tokens],
    media: Mapping[bytes, Tensor],
    device: torch.device,
    *,
    all_previous: bool = False,
    alone_positions: AlonePositions = "restart",
) -> TrainingBatch:
    """Pack sequences; the options are those of the model's configuration."""
    pages = {digest: page for page, digest in enumerate(dict.fromkeys(d for s in sequences for d in s.media))}
    slots = [[-1 if index < 0 else pages[s.media[index]] for index in s.media_index] for s in sequences]
    spans = [s.spans or (0,) * len(s.token_ids) for s in sequences] if any(s.spans for s in sequences) else ()
    batch = whole_sequences([s.token_ids for s in sequences], slots, device, spans, alone_positions)
    if all_previous:
        batch = replace(batch, media_slot=_all_previous(sequences, pages).to(device))
    target = torch.tensor([flag for s in sequences for flag in s.target], device=device)
    target_positions = target.nonzero().squeeze(1)
    starts = batch.query_starts.tolist()
    names = [first + name for first, s in zip(starts, sequences, strict=False) for name in s.names]
    return TrainingBatch(
        batch=replace(batch, last_token=target_positions - 1),
        targets=batch.token_ids[target_positions],
        media=tuple(media[digest].to(device) for digest in pages),
        names=torch.tensor(names, dtype=torch.long, device=device),
    )


def _all_previous(sequences: Sequence[Tokens], pages: Mapping[bytes, int]) -> Tensor:
    """Return media_slot [T, J] for the ablation in which text reads every image before it."""
    max_media = max((len(s.media) for s in sequences), default=0) or 1
    rows = [
        [pages[digest] if number <= index else -1 for number, digest in enumerate(s.media)]
        + [-1] * (max_media - len(s.media))
        for s in sequences
        for index in s.media_index
    ]
    return torch.tensor(rows, dtype=torch.int32)
