"""Tiles of rows: the table with the rows of each program, and steps that the kernels share.

Consecutive rows of one key (a media page, a sequence) form a run; a run is divided into tiles of `rows` rows. Rows are not
sorted or padded. The table is built once per step for all layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import jit, tl, triton

LOG2_E = 1.4426950408889634  # the kernels compute exp2


def by_row(keys: Tensor) -> Tensor:
    """Return keys [T] as [T, 1], and keys [T, J] as they are."""
    return keys if keys.dim() == 2 else keys[:, None]


def tile_records(keys: Tensor, rows: int) -> Tensor:
    """Return int32 [n, 4] for keys [T] or [T, J]: first row, number of rows, key (its first column), 0.

    Keys on the CPU give only real tiles. Keys on a device give a record per row, with 0 rows where no tile begins,
    because counting the tiles would make the host wait.
    """
    keys = by_row(keys)
    return torch.from_numpy(_real_tiles(keys.numpy(), rows)) if keys.is_cpu else _tile_per_row(keys, rows)


def _real_tiles(keys: NDArray[Any], rows: int) -> NDArray[np.int32]:
    begins = np.concatenate([[0], np.flatnonzero((keys[1:] != keys[:-1]).any(1)) + 1])  # of runs
    ends = np.append(begins[1:], len(keys))
    num_tiles = -(-(ends - begins) // rows)
    run = np.repeat(np.arange(len(begins)), num_tiles)
    first = begins[run] + rows * (np.arange(len(run)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles))
    return np.stack([first, np.minimum(ends[run] - first, rows), keys[first, 0], 0 * first], 1).astype(np.int32)


def _tile_per_row(keys: Tensor, rows: int) -> Tensor:
    index = torch.arange(len(keys), device=keys.device)
    differs = torch.ones(len(keys) + 1, dtype=torch.bool, device=keys.device)
    differs[1:-1] = (keys[1:] != keys[:-1]).any(1)
    start = index.where(differs[:-1], 0).cummax(0).values
    end = (index + 1).where(differs[1:], len(keys)).flip(0).cummin(0).values.flip(0)
    begins = (index - start) % rows == 0
    count = (end - index).clamp(max=rows).where(begins, 0)
    return torch.stack([index, count, keys[:, 0], torch.zeros_like(index)], 1).to(torch.int32)


def tiles_of_pages(records: Tensor, slots: Tensor, num_pages: int) -> tuple[Tensor, Tensor]:
    """Return the tiles that read each page, for the backward pass: starts int32 [M + 1] into tiles int32 [n * J].

    slots [T] or [T, J]. A page that a tile has twice is listed twice; tiles of 0 rows come last, after all pages.
    """
    slots = by_row(slots)
    pages = slots[records[:, 0].long()].long()  # [n, J]
    pages = pages.where((pages >= 0) & (records[:, 1:2] > 0), num_pages).flatten()
    ordered, order = pages.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_pages + 1, device=pages.device))
    return starts.to(torch.int32), (order // slots.shape[1]).to(torch.int32)


def with_whole_heads(x: Tensor) -> Tensor:
    """Return x [T, H, K] with contiguous heads in each row; rows may have gaps, as in a slice of a fused projection."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def with_equal_strides(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return key and value [.., H, K] with whole heads and the same strides, as slices of a fused projection have."""
    if key.stride() == value.stride() and key.stride()[-2:] == (key.shape[-1], 1):
        return key, value
    return key.contiguous(), value.contiguous()


def block_width(size: int) -> int:
    """Return the smallest power of two that is at least `size` and wide enough for a matrix instruction."""
    return max(16, triton.next_power_of_2(size))


def page_sizes(media_kv: Tensor) -> dict[str, int]:
    """Return the sizes of pages [M, H, 2, R, K] for which a kernel is compiled, and the widths of its blocks."""
    num_keys, head_dim = media_kv.shape[3:]
    return {"R": num_keys, "K": head_dim, "BLOCK_R": block_width(num_keys), "BLOCK_K": block_width(head_dim)}


@jit
def load_tile(pointers, offsets, row_mask, columns, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Load a tile of rows of WIDTH; columns are masked only if WIDTH is not a power of two."""
    if EVEN:
        return tl.load(pointers + offsets, mask=row_mask[:, None], other=0.0)
    return tl.load(pointers + offsets, mask=row_mask[:, None] & (columns < WIDTH)[None, :], other=0.0)


@jit
def store_tile(pointers, offsets, tile, row_mask, columns, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    value = tile.to(pointers.dtype.element_ty)
    if EVEN:
        tl.store(pointers + offsets, value, mask=row_mask[:, None])
    else:
        tl.store(pointers + offsets, value, mask=row_mask[:, None] & (columns < WIDTH)[None, :])


@jit
def rotary_partner(columns, ROTARY: tl.constexpr):
    """Return the other column of each rotated pair; columns from ROTARY on are returned as they are."""
    HALF: tl.constexpr = ROTARY // 2
    WIDTH: tl.constexpr = HALF & -HALF  # the largest power of two in it: as many elements are loaded at once
    partner = tl.where(columns < HALF, columns + HALF, tl.where(columns < ROTARY, columns - HALF, columns))
    return tl.max_contiguous(tl.multiple_of(partner, WIDTH), WIDTH)


@jit
def online_softmax(scores, v, top, total, out):
    """Add a block of keys to a running softmax: scores [BLOCK, N] in log2, -inf where masked; v [N, BLOCK_K].

    `top`, `total` and `out` are the maximum, the sum of weights and the weighted sum of values of each row so far.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # for a row whose keys are all masked
    weights = tl.exp2(scores - finite_top[:, None])
    shrink = tl.exp2(top - finite_top)
    total = total * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_top, total, out


@jit
def add_query_gradient(grad_q, q, grad_o, lse, delta, k, v, key_mask, scale, log2_scale):
    """Add the part of one block of keys and values [N, BLOCK_K] to the gradient of a query tile [BLOCK, BLOCK_K].

    The weights are computed again from the log-sum-exp `lse` [BLOCK]; `delta` [BLOCK] is the sum over K of out * grad_out.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
    weights = tl.where(key_mask[None, :], tl.exp2(scores - lse[:, None]), 0.0)
    grad_weights = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[:, None]) * scale
    return grad_q + tl.dot(grad_scores.to(k.dtype), k, input_precision="ieee")


@jit
def add_key_gradients(grad_k, grad_v, k, v, q, grad_o, lse, delta, scale, log2_scale):
    """Add the part of one query tile to the gradients of a block of keys and values [N, BLOCK_K]."""
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * log2_scale  # [N, BLOCK]
    weights = tl.exp2(scores - lse[None, :])
    grad_v += tl.dot(weights.to(q.dtype), grad_o, input_precision="ieee")
    grad_weights = tl.dot(v, tl.trans(grad_o), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[None, :]) * scale
    return grad_k + tl.dot(grad_scores.to(q.dtype), q, input_precision="ieee"), grad_v
