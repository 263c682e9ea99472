"""Media attention in torch, for a CPU and the reference backend: no mask of tokens times media, no copy of a page.

Consecutive tokens that read one page (a run) attend to a view of it; many short runs are grouped by page into one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_PER_RUN = 8  # from here on a loop over runs beats one padded batch (measured on two cores)


@dataclass(frozen=True, slots=True)
class PageGroups:
    """The rows of a batch by the page that they read, each group padded to the largest."""

    pages: Tensor  # [P], the pages that are read
    rows: Tensor  # [P, W], the rows that read each of them; padding repeats a group's last row
    index: Tensor  # [T], the position of each row among the P * W
    reads_none: Tensor | None  # [T, 1, 1], the rows that read no page; None if there are none


class MediaRuns:
    """The runs of a batch, from its media slots [T] or [T, J]. Built once per step, it serves all layers."""

    def __init__(self, media_slot: Tensor) -> None:
        self.num_rows = len(media_slot)
        self.reads_all_previous = media_slot.dim() == 2
        self.runs = _runs(media_slot.tolist())  # first row, end row, the pages that these rows read
        self._device = media_slot.device

    @cached_property
    def groups(self) -> PageGroups:
        """For slots [T], at least one of which names a page."""
        rows_of: dict[int, list[int]] = {}
        for first, end, pages in self.runs:
            for page in pages:
                rows_of.setdefault(page, []).extend(range(first, end))
        width = max(map(len, rows_of.values()))
        index, reads_none = [0] * self.num_rows, [True] * self.num_rows
        for group, rows in enumerate(rows_of.values()):
            for column, row in enumerate(rows):
                index[row], reads_none[row] = group * width + column, False
        padded = [rows + rows[-1:] * (width - len(rows)) for rows in rows_of.values()]
        return PageGroups(
            self._tensor(list(rows_of)),
            self._tensor(padded),
            self._tensor(index),
            self._tensor(reads_none)[:, None, None] if any(reads_none) else None,
        )

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, device=self._device)


def _runs(slots: list[Any]) -> list[tuple[int, int, list[int]]]:
    """`slots` holds a page or a list of pages for each row; -1 is none."""
    starts = [row for row in range(len(slots)) if row == 0 or slots[row] != slots[row - 1]]
    runs = []
    for first, end in pairwise([*starts, len(slots)]):
        pages = slots[first] if isinstance(slots[first], list) else [slots[first]]
        runs.append((first, end, [page for page in pages if page >= 0]))
    return runs


def _attend_run(query: Tensor, page: Tensor, scale: float) -> Tensor:
    """Attend to one page [H, 2, R, K], a view of the pool: query [Q, H, K] -> [Q, H, K]."""
    out = F.scaled_dot_product_attention(query.transpose(0, 1)[None], page[None, :, 0], page[None, :, 1], scale=scale)
    return out[0].transpose(0, 1)


def _attend_runs(query: Tensor, media_kv: Tensor, plan: MediaRuns, scale: float) -> Tensor:
    # one unbind has one gradient of the pool's size; an index per run would have as many as there are runs
    pool: Sequence[Tensor] | Tensor = media_kv.unbind(0) if media_kv.requires_grad else media_kv
    outputs = [
        _attend_run(query[first:end], pool[pages[0]], scale) if pages else torch.zeros_like(query[first:end])
        for first, end, pages in plan.runs
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat([query[:0], *outputs])


def _attend_groups(query: Tensor, media_kv: Tensor, groups: PageGroups, scale: float) -> Tensor:
    pages = media_kv.index_select(0, groups.pages)  # [P, H, 2, R, K]
    q = query[groups.rows].transpose(1, 2)  # [P, H, W, K]
    out = F.scaled_dot_product_attention(q, pages[:, :, 0], pages[:, :, 1], scale=scale)
    out = out.transpose(1, 2).flatten(0, 1)[groups.index]
    return out if groups.reads_none is None else out.masked_fill(groups.reads_none, 0.0)


def _attend_all_previous(query: Tensor, media_kv: Tensor, plan: MediaRuns, scale: float) -> Tensor:
    """Runs of tokens with one list of pages, whose keys are concatenated."""
    outputs = [query[:0]]
    for first, end, pages in plan.runs:
        if pages:
            kv = media_kv[pages].permute(1, 2, 0, 3, 4).flatten(2, 3)  # [H, 2, n R, K]
            outputs.append(_attend_run(query[first:end], kv, scale))
        else:
            outputs.append(torch.zeros_like(query[first:end]))
    return torch.cat(outputs)


def attend_by_runs(query: Tensor, media_kv: Tensor, plan: MediaRuns, scale: float) -> Tensor:
    """Attend to the pages of media_kv [M, H, 2, R, K], differentiably: query [T, H, K] -> [T, H, K]."""
    if plan.reads_all_previous:
        return _attend_all_previous(query, media_kv, plan, scale)
    # the backward pass of one run costs as much as that of the whole batch
    trains = torch.is_grad_enabled() and (query.requires_grad or media_kv.requires_grad)
    if len(plan.runs) <= 4 or (plan.num_rows >= ROWS_PER_RUN * len(plan.runs) and not trains):
        return _attend_runs(query, media_kv, plan, scale)
    return _attend_groups(query, media_kv, plan.groups, scale)
