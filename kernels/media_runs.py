"""Media attention in plain torch, as a processor serves it: no mask of tokens times media, no copy of a page.

Neighbouring tokens of one page (a run) attend to a view of it; many short runs are grouped by page into one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_PER_RUN = 8  # from here on a loop over runs beats one padded batch (measured on two cores)


def _runs(slots: list[int]) -> list[tuple[int, int, int]]:
    """Neighbouring tokens with one page: (first row, end row, page)."""
    runs, first = [], 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[first]:
            runs.append((first, row, slots[first]))
            first = row
    return runs


def _attend_run(query: Tensor, page: Tensor, scale: float) -> Tensor:
    """query [Q, H, K], page [H, 2, R, K], a view of the pool -> [Q, H, K]"""
    out = F.scaled_dot_product_attention(query.transpose(0, 1)[None], page[None, :, 0], page[None, :, 1], scale=scale)
    return out[0].transpose(0, 1)


def _attend_runs(query: Tensor, media_kv: Tensor, runs: list[tuple[int, int, int]], scale: float) -> Tensor:
    # one unbind has one gradient of the pool's size, an index a run would have as many as runs
    pages: Sequence[Tensor] | Tensor = media_kv.unbind(0) if media_kv.requires_grad else media_kv
    outputs = [
        torch.zeros_like(query[first:end]) if slot < 0 else _attend_run(query[first:end], pages[slot], scale)
        for first, end, slot in runs
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat([query[:0], *outputs])


def _attend_groups(query: Tensor, media_kv: Tensor, slots: list[int], scale: float) -> Tensor:
    """Many short runs: rows of one page together, padded to the largest group, one batch over the pages."""
    groups: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            groups.setdefault(slot, []).append(row)
    if not groups:
        return torch.zeros_like(query)
    width = max(map(len, groups.values()))
    padded = torch.tensor([rows + rows[-1:] * (width - len(rows)) for rows in groups.values()], device=query.device)
    pages = media_kv.index_select(0, torch.tensor(list(groups), device=query.device))  # [P, H, 2, R, K]
    q = query[padded].transpose(1, 2)  # [P, H, W, K]
    out = F.scaled_dot_product_attention(q, pages[:, :, 0], pages[:, :, 1], scale=scale)
    place = [0] * len(slots)
    for group, rows in enumerate(groups.values()):
        for column, row in enumerate(rows):
            place[row] = group * width + column
    out = out.transpose(1, 2).flatten(0, 1)[torch.tensor(place, device=query.device)]
    if len(place) > sum(map(len, groups.values())):
        out = out.masked_fill(torch.tensor(slots, device=query.device)[:, None, None] < 0, 0.0)
    return out


def _attend_all_previous(query: Tensor, media_kv: Tensor, slots: list[list[int]], scale: float) -> Tensor:
    """Runs of tokens with one list of pages, whose keys are laid in one row."""
    outputs, first = [query[:0]], 0
    for row in range(1, len(slots) + 1):
        if row < len(slots) and slots[row] == slots[first]:
            continue
        pages = [slot for slot in slots[first] if slot >= 0]
        if pages:
            kv = media_kv[pages].permute(1, 2, 0, 3, 4).flatten(2, 3)  # [H, 2, n R, K]
            outputs.append(_attend_run(query[first:row], kv, scale))
        else:
            outputs.append(torch.zeros_like(query[first:row]))
        first = row
    return torch.cat(outputs)


def attend_by_runs(query: Tensor, media_kv: Tensor, media_slot: Tensor, scale: float) -> Tensor:
    """Arguments as those of `media_attention`; differentiable."""
    slots = media_slot.tolist()
    if media_slot.dim() == 2:
        return _attend_all_previous(query, media_kv, slots, scale)
    runs = _runs(slots)
    # a run's backward pass costs as much as a batch's
    trains = torch.is_grad_enabled() and (query.requires_grad or media_kv.requires_grad)
    if len(runs) <= 4 or (len(slots) >= ROWS_PER_RUN * len(runs) and not trains):
        return _attend_runs(query, media_kv, runs, scale)
    return _attend_groups(query, media_kv, slots, scale)
