"""Other implementations of media attention on the same pages, for comparison of speed and results with the kernel.

Each takes a query [T, H, K], pages [M, H, 2, R, K] and slots [T], and returns [T, H, K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Contender = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _concatenate(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values of all pages as one sequence, [H, M * R, K] each."""
    key, value = pages.permute(2, 1, 0, 3, 4).flatten(2, 3)
    return key, value


def _mask(pages: Tensor, slots: Tensor) -> Tensor:
    """Return the mask [T, M * R] that is usually built from the positions of the media tokens."""
    key_slots = torch.arange(len(pages), device=slots.device).repeat_interleave(pages.shape[3])
    return slots[:, None] == key_slots


def dense_mask(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Attend to all media at once with a mask, as the server of IDEFICS does."""
    key, value = _concatenate(pages)
    mask = _mask(pages, slots)
    return F.scaled_dot_product_attention(query.transpose(0, 1)[None], key[None], value[None], mask, scale=scale)[
        0
    ].transpose(0, 1)


def einsum(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Materialise the scores of all media, mask them, and apply softmax, as OpenFlamingo does."""
    key, value = _concatenate(pages)
    scores = torch.einsum("thk,hnk->htn", query * scale, key)
    scores = scores.masked_fill(~_mask(pages, slots), torch.finfo(scores.dtype).min)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return torch.einsum("htn,hnk->thk", scores.softmax(-1), value)


def gather(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Gather a copy of the page of each token."""
    gathered = pages[slots.long()]  # [T, H, 2, R, K]
    return F.scaled_dot_product_attention(query[:, :, None], gathered[:, :, 0], gathered[:, :, 1], scale=scale)[:, :, 0]


PLAIN: dict[str, Contender] = {"dense mask": dense_mask, "einsum": einsum, "gather": gather}
VARLEN = ("FA2 varlen of torch", "efficient varlen of torch")


def _runs(slots: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the start rows of the runs [n + 1], their pages [n], and the longest run; not part of the measured time."""
    pages, lengths = torch.unique_consecutive(slots, return_counts=True)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return starts, pages, int(lengths.max())


def as_rows(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the pool as keys and values, [rows, H, K] each; page p begins at row 2 H R p."""
    num_pages, num_heads, _, num_keys, head_dim = pages.shape
    rows = 2 * num_heads * num_keys * (num_pages - 1) + num_keys
    shape, strides = (rows, num_heads, head_dim), (head_dim, 2 * num_keys * head_dim, 1)
    offset = pages.storage_offset()
    key = pages.as_strided(shape, strides, offset)
    return key, pages.as_strided(shape, strides, offset + num_keys * head_dim)


def varlen(pages: Tensor, slots: Tensor) -> dict[str, Contender]:
    """Return torch's packed attentions. A run is a sequence whose keys are the R keys of its page."""
    starts, run_pages, longest = _runs(slots)
    _, num_heads, _, num_keys, _ = pages.shape
    key_starts = F.pad(run_pages.to(torch.int32) * (2 * num_heads * num_keys), (0, 1))
    key_lengths = torch.full_like(run_pages, num_keys, dtype=torch.int32)

    def flash(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
        out: Any = torch.ops.aten._flash_attention_forward(
            query, *as_rows(pages), starts, key_starts, longest, num_keys, 0.0, False, False,
            scale=scale, seqused_k=key_lengths,
        )  # fmt: skip
        result: Tensor = out[0]
        return result

    def efficient(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
        key, value = as_rows(pages)
        out: Any = torch.ops.aten._efficient_attention_forward(
            query[None], key[None], value[None], None, starts, key_starts, longest, num_keys, 0.0, 0,
            scale=scale, seqlen_k=key_lengths,
        )  # fmt: skip
        result: Tensor = out[0][0]
        return result

    return dict(zip(VARLEN, (flash, efficient), strict=True))


def flex(pages: Tensor, slots: Tensor) -> Contender:
    """Return compiled FlexAttention. The measured time excludes its block mask, which a server would build per step."""
    num_keys = pages.shape[3]

    def is_visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return slots[row] == key // num_keys

    mask = create_block_mask(
        is_visible, None, None, len(slots), len(pages) * num_keys, device=str(slots.device), BLOCK_SIZE=(64, 64)
    )
    attend: Any = torch.compile(flex_attention)

    def run(query: Tensor, pages: Tensor, slots: Tensor, scale: float) -> Tensor:
        key, value = _concatenate(pages)
        out: Tensor = attend(query.transpose(0, 1)[None], key[None], value[None], block_mask=mask, scale=scale)
        return out[0].transpose(0, 1)

    return run
