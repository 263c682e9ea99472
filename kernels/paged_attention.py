"""Causal self-attention over the blocks of the text cache: prefill and decode of any mix of sequences.

The first `num_shared_blocks` blocks may be the same for every sequence (a support set): they are then read once for
the whole batch and merged with each sequence's own part by their log-sum-exp.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_attention import alibi_bias


def paged_attention_reference(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    num_shared_blocks: int = 0,
) -> Tensor:
    """`num_shared_blocks` is a promise about block_table, and changes nothing in the result."""
    group = query.shape[1] // kv_cache.shape[2]
    slopes = query.new_zeros(query.shape[1]) if alibi_slopes is None else alibi_slopes
    outputs = [query[:0].float()]
    spans = pairwise(query_starts.tolist())
    for blocks, (first, end), context in zip(block_table, spans, context_lengths.tolist(), strict=True):
        keys, values = _gather(kv_cache, blocks, 0, context).float().repeat_interleave(group, 1)  # [H, C, K] each
        scores = torch.einsum("qhk,hck->hqc", query[first:end].float(), keys) * scale
        weights = (scores + alibi_bias(slopes, end - first, context)).softmax(-1)
        outputs.append(torch.einsum("hqc,hck->qhk", weights, values))
    return torch.cat(outputs).to(query.dtype)


def _gather(kv_cache: Tensor, blocks: Tensor, first: int, end: int) -> Tensor:
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


def _attend_with_lse(query: Tensor, kv: Tensor, scale: float, bias: Tensor) -> tuple[Tensor, Tensor]:
    """query [Q, H, K], kv [2, G, C, K], bias [H, Q, C] -> float32 output [Q, H, K] and log-sum-exp [Q, H, 1]"""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = kv.shape[1]
    grouped = query.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)  # heads of a group are neighbours
    scores = (grouped @ kv[0].transpose(1, 2)).float().view(num_heads, num_queries, -1) * scale + bias
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp().to(query.dtype).view(num_kv_heads, -1, kv.shape[2])
    out = (weights @ kv[1]).float().view(num_heads, num_queries, head_dim)
    return out.transpose(0, 1), lse.transpose(0, 1)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """The attention over two sets of keys, from that over each: outputs [Q, H, K], log-sum-exps [Q, H, 1]."""
    share = (lse_a - lse_b).sigmoid()
    return out_a * share + out_b * (1 - share)


def _cascade(
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
    out, lse = _attend_with_lse(query, _gather(kv_cache, block_table[0], 0, shared), scale, bias)
    outputs = [query[:0]]
    for blocks, (first, end), context in zip(block_table, pairwise(starts), contexts, strict=True):
        if first == end:
            continue
        bias = alibi_bias(slopes, end - first, context)[:, :, shared:]
        own = _attend_with_lse(query[first:end], _gather(kv_cache, blocks, shared, context), scale, bias)
        outputs.append(merge(out[first:end], lse[first:end], *own).to(query.dtype))
    return torch.cat(outputs)


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    num_shared_blocks: int = 0,
) -> Tensor:
    """query [T, H, K], a sequence's last tokens together; kv_cache [N, 2, G, B, K]; block_table [S, W];
    query_starts [S + 1]; context_lengths [S], the tokens in the cache, these included -> [T, H, K]"""
    starts, contexts = query_starts.tolist(), context_lengths.tolist()
    if num_shared_blocks and len(contexts) > 1:
        return _cascade(query, kv_cache, block_table, starts, contexts, scale, alibi_slopes, num_shared_blocks)
    outputs = [
        _attend(query[first:end], _gather(kv_cache, blocks, 0, context), scale, alibi_slopes)
        for blocks, (first, end), context in zip(block_table, pairwise(starts), contexts, strict=True)
        if end > first
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat([query[:0], *outputs])
