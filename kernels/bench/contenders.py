"""Media attention as others do it, on the same pages: what the kernel is measured against and checked with.

Each takes a query [T, H, K], pages [M, H, 2, R, K] and slots [T], and gives [T, H, K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Contender = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _one_row(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all pages in one row: [H, M * R, K]"""
    key, value = pages.permute(2, 1, 0, 3, 4).flatten(2, 3)
    return key, value


def _mask(pages: Tensor, slots: Tensor) -> Tensor:
    """[T, M * R], what the usual way builds from the places of the media tokens."""
    owner = torch.arange(len(pages), device=slots.device).repeat_interleave(pages.shape[3])
    return slots[:, None] == owner


def dense_mask(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
    """One attention over all media, masked (as IDEFICS' server does)."""
    key, value = _one_row(pages)
    mask = _mask(pages, slots)
    return F.scaled_dot_product_attention(query.transpose(0, 1)[None], key[None], value[None], mask, scale=scale)[
        0
    ].transpose(0, 1)


def einsum(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Scores of all media in memory, masked, softmax, sum (as OpenFlamingo does)."""
    key, value = _one_row(pages)
    scores = torch.einsum("thk,hnk->htn", query * scale, key)
    scores = scores.masked_fill(~_mask(pages, slots), torch.finfo(scores.dtype).min)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return torch.einsum("htn,hnk->thk", scores.softmax(-1), value)


def gather(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Every token fetches its own copy of its page."""
    own = pages[slots.long()]  # [T, H, 2, R, K]
    return F.scaled_dot_product_attention(query[:, :, None], own[:, :, 0], own[:, :, 1], scale=scale)[:, :, 0]


def _runs(slots: Tensor) -> tuple[Tensor, Tensor, int]:
    """First rows of the runs [n + 1], their pages [n], and the longest run; made outside of what is timed."""
    pages, lengths = torch.unique_consecutive(slots, return_counts=True)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return starts, pages, int(lengths.max())


def as_rows(pages: Tensor) -> tuple[Tensor, Tensor]:
    """The pool itself as keys [rows, H, K] and values: page p begins at row 2 H R p. No copy."""
    num_pages, num_heads, _, num_keys, head_dim = pages.shape
    rows = 2 * num_heads * num_keys * (num_pages - 1) + num_keys
    shape, strides = (rows, num_heads, head_dim), (head_dim, 2 * num_keys * head_dim, 1)
    offset = pages.storage_offset()
    key = pages.as_strided(shape, strides, offset)
    return key, pages.as_strided(shape, strides, offset + num_keys * head_dim)


def varlen(pages: Tensor, slots: Tensor) -> dict[str, Contender]:
    """Torch's packed attentions: a run is a sequence whose keys begin at its page and end R keys later."""
    starts, run_pages, longest = _runs(slots)
    _, num_heads, _, num_keys, _ = pages.shape
    key_starts = F.pad(run_pages.to(torch.int32) * (2 * num_heads * num_keys), (0, 1))
    used = torch.full_like(run_pages, num_keys, dtype=torch.int32)

    def flash(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
        out: Any = torch.ops.aten._flash_attention_forward(
            query, *as_rows(pages), starts, key_starts, longest, num_keys, 0.0, False, False,
            scale=scale, seqused_k=used,
        )  # fmt: skip
        result: Tensor = out[0]
        return result

    def efficient(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
        key, value = as_rows(pages)
        out: Any = torch.ops.aten._efficient_attention_forward(
            query[None], key[None], value[None], None, starts, key_starts, longest, num_keys, 0.0, 0,
            scale=scale, seqlen_k=used,
        )  # fmt: skip
        result: Tensor = out[0][0]
        return result

    return {"FA2 varlen of torch": flash, "efficient varlen of torch": efficient}


def flex(pages: Tensor, slots: Tensor) -> Contender:
    """FlexAttention, compiled; its block mask is made here, outside of what is timed, as a server could not."""
    num_keys = pages.shape[3]

    def owns(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return slots[row] == key // num_keys

    mask = create_block_mask(
        owns, None, None, len(slots), len(pages) * num_keys, device=str(slots.device), BLOCK_SIZE=(64, 64)
    )
    attend: Any = torch.compile(flex_attention)

    def run(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
        key, value = _one_row(pages)
        out: Tensor = attend(query.transpose(0, 1)[None], key[None], value[None], block_mask=mask, scale=scale)
        return out[0].transpose(0, 1)

    return run
