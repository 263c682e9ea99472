"""Masked cross-attention: each text token attends to the R keys of one media page, or to none (Flamingo, section 3.1.3).

Each token has the number of its page, so no mask of tokens times media is built; a token without a page gets exactly zero.
With several pages per token (the "all previous images" ablation) the softmax is over all their keys. In torch, consecutive
tokens that read one page (a run) attend to a view of it; many short runs are grouped by page into one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import needs_gradients, use_triton
from kernels.media_attention_gpu import DifferentiableMediaAttention, launch_media, media_tiles
from kernels.rows import rms_norm, rms_norm_reference
from kernels.tiles import by_row, with_whole_heads

ROWS_PER_RUN = 8  # from this number on, a loop over runs is faster than one padded batch (measured on two cores)


@dataclass(frozen=True, slots=True)
class PageGroups:
    """The rows of a batch grouped by the page that they read; groups are padded to the largest."""

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
        """The rows grouped by page, for slots [T] of which at least one is a page."""
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
    """Return the runs; `slots` has a page or a list of pages for each row, -1 for none."""
    starts = [row for row in range(len(slots)) if row == 0 or slots[row] != slots[row - 1]]
    runs = []
    for first, end in pairwise([*starts, len(slots)]):
        pages = slots[first] if isinstance(slots[first], list) else [slots[first]]
        runs.append((first, end, [page for page in pages if page >= 0]))
    return runs


# which rows read which page, built once per step: the tile table of `media_tiles` for Triton, runs for torch
MediaPlan: TypeAlias = Tensor | MediaRuns


def media_attention_reference(
    query: Tensor,
    media_kv: Tensor,
    media_slot: Tensor,
    *,
    scale: float,
    query_norm: Tensor | None = None,
    query_norm_eps: float = 1e-6,
    media_scale: Tensor | None = None,
    plan: MediaPlan | None = None,
) -> Tensor:
    """The specification: dense and slow, each token has a copy of its pages. A page that is listed twice counts twice."""
    q = query.float()
    if query_norm is not None:
        q = rms_norm_reference(q, query_norm, query_norm_eps)
    slots = by_row(media_slot).long()  # [T, J]
    pages = dequantise_pages(media_kv, media_scale)[slots.clamp(min=0)].float()  # [T, J, H, 2, R, K]
    absent = (slots < 0)[:, :, None, None, None]
    keys, values = (pages[:, :, :, i].masked_fill(absent, 0.0) for i in (0, 1))
    scores = torch.einsum("thk,tjhrk->thjr", q, keys) * scale
    scores = scores.masked_fill((slots < 0)[:, None, :, None], float("-inf"))
    # a row that is all -inf would be NaN: its weights, and so its output, are masked to zero
    nowhere = (slots < 0).all(1)[:, None, None, None]
    weights = scores.masked_fill(nowhere, 0.0).flatten(2).softmax(-1).view(scores.shape)
    weights = weights.masked_fill((slots < 0)[:, None, :, None], 0.0)
    return torch.einsum("thjr,tjhrk->thk", weights, values).to(query.dtype)


def quantise_pages(media_kv: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise pages to 8 bits: [M, H, 2, R, K] -> int8 of that shape, and a float32 scale per key or value [M, H, 2, R].

    The server does not use pages of 8 bits yet.
    """
    media_scale = media_kv.float().abs().amax(-1).clamp(min=1e-30) / 127
    return (media_kv.float() / media_scale[..., None]).round().to(torch.int8), media_scale


def dequantise_pages(media_kv: Tensor, media_scale: Tensor | None) -> Tensor:
    """Return pages in float32, or as they are if they have no scales."""
    return media_kv if media_scale is None else media_kv.float() * media_scale[..., None]


def _attend_run(query: Tensor, pages: Sequence[Tensor], scale: float) -> Tensor:
    """Attend to all keys of these pages [H, 2, R, K]: query [Q, H, K] -> [Q, H, K]. One page is read as a view."""
    if not pages:
        return torch.zeros_like(query)
    key, value = (pages[0] if len(pages) == 1 else torch.cat(list(pages), dim=2)).unbind(1)
    out = F.scaled_dot_product_attention(query.transpose(0, 1)[None], key[None], value[None], scale=scale)
    return out[0].transpose(0, 1)


def _attend_runs(query: Tensor, media_kv: Tensor, plan: MediaRuns, scale: float) -> Tensor:
    # one unbind has one gradient of the pool's size; indexing per run would have one for each run
    pool: Sequence[Tensor] | Tensor = media_kv.unbind(0) if media_kv.requires_grad else media_kv
    outputs = [_attend_run(query[first:end], [pool[page] for page in pages], scale) for first, end, pages in plan.runs]
    return outputs[0] if len(outputs) == 1 else torch.cat([query[:0], *outputs])


def _attend_groups(query: Tensor, media_kv: Tensor, groups: PageGroups, scale: float) -> Tensor:
    pages = media_kv.index_select(0, groups.pages)  # [P, H, 2, R, K]
    q = query[groups.rows].transpose(1, 2)  # [P, H, W, K]
    out = F.scaled_dot_product_attention(q, pages[:, :, 0], pages[:, :, 1], scale=scale)
    out = out.transpose(1, 2).flatten(0, 1)[groups.index]
    return out if groups.reads_none is None else out.masked_fill(groups.reads_none, 0.0)


def _attend_in_torch(query: Tensor, media_kv: Tensor, plan: MediaRuns, scale: float) -> Tensor:
    """Attend to the pages of media_kv [M, H, 2, R, K], differentiably: query [T, H, K] -> [T, H, K]."""
    # the backward pass of one run costs as much as that of the whole batch
    are_long = plan.num_rows >= ROWS_PER_RUN * len(plan.runs) and not needs_gradients(query, media_kv)
    if plan.reads_all_previous or len(plan.runs) <= 4 or are_long:
        return _attend_runs(query, media_kv, plan, scale)
    return _attend_groups(query, media_kv, plan.groups, scale)


def _checked(media_kv: Tensor, *, may_copy: bool) -> Tensor:
    """Return pages in the layout that the kernel reads: copied if `may_copy`, else another layout raises `ValueError`."""
    num_keys, head_dim = media_kv.shape[3:]
    inner = (2 * num_keys * head_dim, num_keys * head_dim, head_dim, 1)
    if media_kv.stride()[1:] != inner:
        if may_copy:
            return media_kv.contiguous()
        raise ValueError(f"media_kv has strides {media_kv.stride()[1:]} within a page, the kernel requires {inner}")
    if head_dim % 16 == 0 and media_kv.stride(0) % 16:
        raise ValueError(f"media_kv has a page stride of {media_kv.stride(0)}, which is not a multiple of 16")
    return media_kv


def plan_media(x: Tensor, media_slot: Tensor | None, head_dim: int) -> MediaPlan | None:
    """Return the plan that all layers of a step share, for the backend and dtype of `x`; None if no token reads a page."""
    if media_slot is None:
        return None
    return media_tiles(media_slot, head_dim, x.dtype) if use_triton(x) else MediaRuns(media_slot)


def media_attention(
    query: Tensor,
    media_kv: Tensor,
    media_slot: Tensor,
    *,
    scale: float,
    query_norm: Tensor | None = None,
    query_norm_eps: float = 1e-6,
    media_scale: Tensor | None = None,
    plan: MediaPlan | None = None,
) -> Tensor:
    """Attend from each token to the keys of its pages: query [T, H, K] -> [T, H, K].

    media_kv [M, H, 2, R, K] may be a view of the pool. media_slot [T] or [T, J] has page numbers, -1 for none. query_norm
    [K] is the RMSNorm of each head's query. media_scale [M, H, 2, R] is for int8 pages. `plan` comes from `plan_media`.

    Raises `ValueError` for pages in a layout that the kernel cannot read.
    """
    if not use_triton(query):
        if query_norm is not None:
            query = rms_norm(query, query_norm, query_norm_eps)
        runs = plan if isinstance(plan, MediaRuns) else MediaRuns(media_slot)
        return _attend_in_torch(query, dequantise_pages(media_kv, media_scale).to(query.dtype), runs, scale)
    grad = needs_gradients(query, media_kv)
    if query_norm is not None and (grad or media_slot.dim() == 2):  # the kernel's own norm has no gradient
        query, query_norm = rms_norm(query, query_norm, query_norm_eps), None
    if media_scale is not None and (grad or media_slot.dim() == 2):
        raise ValueError("media_scale (pages of 8 bits) requires one page per token, and supports no gradients")
    query = with_whole_heads(query)
    media_kv = _checked(media_kv, may_copy=grad)
    tiles = plan if isinstance(plan, Tensor) else media_tiles(media_slot, query.shape[2], query.dtype)
    if grad:
        return DifferentiableMediaAttention.apply(query, media_kv, media_slot, tiles, scale)
    norm = None if query_norm is None else (query_norm, query_norm_eps)
    return launch_media(query, media_kv, media_slot, tiles, scale, norm, media_scale)
