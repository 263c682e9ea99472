"""Sequences packed into forwards: no padding anywhere, logits only where a token is to be predicted.

A media that several sequences of a batch show is one page, encoded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.batch import Batch, whole_sequences
from training.examples import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """`media` holds pixels [F, 3, h, w] or, from a cache, features [F, P, Dv]: a page each, in the pages' order."""

    batch: Batch
    targets: Tensor  # [W] int64, what follows each row of `batch.last_token`
    media: tuple[Tensor, ...]
    names: Tensor  # [N] int64, the rows with which an image's name begins

    @property
    def num_targets(self) -> int:
        return len(self.targets)


def pack(sequences: Iterable[Tokens], max_tokens: int) -> list[list[Tokens]]:
    """Sequences in their order, as many together as fit."""
    packs: list[list[Tokens]] = []
    room = 0
    for sequence in sequences:
        if not packs or len(sequence.token_ids) > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(sequence)
        room -= len(sequence.token_ids)
    return packs


def collate(
    sequences: Sequence[Tokens], media: Mapping[bytes, Tensor], device: torch.device, *, all_previous: bool = False
) -> TrainingBatch:
    pages = {digest: page for page, digest in enumerate(dict.fromkeys(d for s in sequences for d in s.media))}
    slots = [[-1 if index < 0 else pages[s.media[index]] for index in s.media_index] for s in sequences]
    batch = whole_sequences([s.token_ids for s in sequences], slots, device)
    if all_previous:
        batch = replace(batch, media_slot=_all_previous(sequences, pages).to(device))
    target = torch.tensor([flag for s in sequences for flag in s.target], device=device)
    places = target.nonzero().squeeze(1)
    starts = batch.query_starts.tolist()
    names = [first + name for first, s in zip(starts, sequences, strict=False) for name in s.names]
    return TrainingBatch(
        batch=replace(batch, last_token=places - 1),
        targets=batch.token_ids[places],
        media=tuple(media[digest].to(device) for digest in pages),
        names=torch.tensor(names, dtype=torch.long, device=device),
    )


def _all_previous(sequences: Sequence[Tokens], pages: Mapping[bytes, int]) -> Tensor:
    """media_slot [T, J] of the ablation in which text reads every image before it."""
    most = max((len(s.media) for s in sequences), default=0) or 1
    rows = [
        [pages[s.media[place]] if place <= index else -1 for place in range(len(s.media))]
        + [-1] * (most - len(s.media))
        for s in sequences
        for index in s.media_index
    ]
    return torch.tensor(rows, dtype=torch.int32)
