"""Paged attention in plain torch, as a processor serves it: one gather and one attention a sequence.

With shared blocks, their keys meet the queries of all sequences in one product, and the two parts are merged by their
log-sum-exp.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_attention import alibi_bias


def gather_tokens(kv_cache: Tensor, blocks: Tensor, first: int, end: int) -> Tensor:
    """Keys and values of the tokens first .. end of one sequence, in one copy: [2, G, end - first, K]."""
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    begin = first // block_size
    blocks = blocks[begin : -(-end // block_size)]
    kv = kv_cache.permute(1, 2, 0, 3, 4).index_select(2, blocks)
    kv = kv.view(2, num_kv_heads, len(blocks) * block_size, head_dim)
    return kv[:, :, first - begin * block_size : end - begin * block_size]


def _attend(query: Tensor, kv: Tensor, scale: float, alibi_slopes: Tensor | None) -> Tensor:
    """The queries of one sequence, its last tokens: query [Q, H, K], kv [2, G, C, K] -> [Q, H, K]"""
    num_queries, num_keys = len(query), kv.shape[2]
    whole = num_queries == num_keys and alibi_slopes is None
    mask: Tensor | None = None
    if alibi_slopes is not None:
        mask = alibi_bias(alibi_slopes, num_queries, num_keys).to(query.dtype)
    elif num_queries > 1 and not whole:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], kv[0][None], kv[1][None], mask, is_causal=whole, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def attend_by_sequence(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    starts: list[int],
    contexts: list[int],
    scale: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    outputs = [
        _attend(query[first:end], gather_tokens(kv_cache, blocks, 0, context), scale, alibi_slopes)
        for blocks, (first, end), context in zip(block_table, pairwise(starts), contexts, strict=True)
        if end > first
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat([query[:0], *outputs])


def _attend_with_lse(query: Tensor, kv: Tensor, scale: float, bias: Tensor) -> tuple[Tensor, Tensor]:
    """query [Q, H, K], kv [2, G, C, K], bias [H, Q, C] -> float32 output [Q, H, K] and log-sum-exp [Q, H, 1]"""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = kv.shape[1]
    keys, values = kv.float()
    grouped = query.float().transpose(0, 1).reshape(num_kv_heads, -1, head_dim)  # heads of a group are neighbours
    scores = (grouped @ keys.transpose(1, 2)).view(num_heads, num_queries, -1) * scale + bias
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp().view(num_kv_heads, -1, kv.shape[2])
    out = (weights @ values).view(num_heads, num_queries, head_dim)
    return out.transpose(0, 1), lse.transpose(0, 1)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """The attention over two sets of keys, from that over each: outputs [Q, H, K], log-sum-exps [Q, H, 1]."""
    share = (lse_a - lse_b).sigmoid()
    return out_a * share + out_b * (1 - share)


def attend_in_cascade(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    starts: list[int],
    contexts: list[int],
    scale: float,
    alibi_slopes: Tensor | None,
    num_shared_blocks: int,
) -> Tensor:
    shared = num_shared_blocks * kv_cache.shape[3]
    slopes = query.new_zeros(query.shape[1]) if alibi_slopes is None else alibi_slopes
    places = torch.cat([torch.arange(c - (e - s), c) for (s, e), c in zip(pairwise(starts), contexts, strict=True)])
    if len(places) and shared > int(places.min()):
        raise ValueError(f"the shared blocks hold {shared} tokens, but a query's place is {int(places.min())}")
    distance = torch.arange(shared, device=query.device) - places.to(query.device)[:, None]  # [T, C], all behind
    bias = slopes.float()[:, None, None] * distance
    out, lse = _attend_with_lse(query, gather_tokens(kv_cache, block_table[0], 0, shared), scale, bias)
    outputs = [query[:0]]
    for blocks, (first, end), context in zip(block_table, pairwise(starts), contexts, strict=True):
        if first == end:
            continue
        bias = alibi_bias(slopes, end - first, context)[:, :, shared:]
        own = _attend_with_lse(query[first:end], gather_tokens(kv_cache, blocks, shared, context), scale, bias)
        outputs.append(merge(out[first:end], lse[first:end], *own).to(query.dtype))
    return torch.cat(outputs)
