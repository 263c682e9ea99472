"""The tile table: which rows of the packed batch one program takes, made once a step for all layers.

Neighbouring rows with one key (a media page, a sequence) form a run; a run is cut every `rows` rows. Rows stay where
they are: no sort, no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_row(keys: Tensor) -> Tensor:
    """[T] -> [T, 1]; [T, J] as it is."""
    return keys if keys.dim() == 2 else keys[:, None]


def tile_records(keys: Tensor, rows: int) -> Tensor:
    """keys [T] or [T, J] -> int32 [n, 4]: first row, number of rows, key of the first row (its first column), 0.

    On the CPU only real tiles; on a device one record a row, those that begin no tile with 0 rows, since counting
    them would make the host wait.
    """
    keys = by_row(keys)
    places = torch.arange(len(keys), device=keys.device)
    differs = torch.ones(len(keys) + 1, dtype=torch.bool, device=keys.device)
    differs[1:-1] = (keys[1:] != keys[:-1]).any(1)
    start = places.where(differs[:-1], 0).cummax(0).values
    end = (places + 1).where(differs[1:], len(keys)).flip(0).cummin(0).values.flip(0)
    begins = (places - start) % rows == 0
    count = (end - places).clamp(max=rows).where(begins, 0)
    records = torch.stack([places, count, keys[:, 0], torch.zeros_like(places)], 1).to(torch.int32)
    return records if records.is_cuda else records[begins]


def tiles_of_pages(records: Tensor, slots: Tensor, num_pages: int) -> tuple[Tensor, Tensor]:
    """For the backward pass, the tiles that read each page: starts int32 [M + 1] into tiles int32 [n * J].

    slots [T] or [T, J]. A page that a tile names twice is listed twice; tiles of 0 rows come last, after all pages.
    """
    slots = by_row(slots)
    pages = slots[records[:, 0].long()].long()  # [n, J]
    pages = pages.where((pages >= 0) & (records[:, 1:2] > 0), num_pages).flatten()
    ordered, order = pages.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_pages + 1, device=pages.device))
    return starts.to(torch.int32), (order // slots.shape[1]).to(torch.int32)
