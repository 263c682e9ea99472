"""Causal self-attention over packed whole sequences, without a cache, for training and the oracle.

It is plain torch and differentiable; grouped heads and ALiBi are as in `paged_attention`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def alibi_bias(slopes: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Return [H, Q, C]: minus slope times distance, for queries that end at the last key; -inf ahead of each query."""
    positions = torch.arange(num_keys, device=slopes.device)
    distance = positions - positions[num_keys - num_queries :, None]  # [Q, C]
    bias = slopes.float()[:, None, None] * distance
    return bias if num_queries == 1 else bias.masked_fill(distance > 0, float("-inf"))


def causal_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, *, scale: float, alibi_slopes: Tensor | None = None
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    slopes = query.new_zeros(query.shape[1]) if alibi_slopes is None else alibi_slopes
    outputs = [query[:0].float()]
    for first, end in pairwise(query_starts.tolist()):
        q, k, v = query[first:end].float(), key[first:end].float(), value[first:end].float()
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhk,chk->hqc", q, k) * scale + alibi_bias(slopes, end - first, end - first)
        outputs.append(torch.einsum("hqc,chk->qhk", scores.softmax(-1), v))
    return torch.cat(outputs).to(query.dtype)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, *, scale: float, alibi_slopes: Tensor | None = None
) -> Tensor:
    """Attend within each sequence: query [T, H, K]; key, value [T, G, K]; query_starts [S + 1], first rows -> [T, H, K]."""
    if torch.is_grad_enabled() and query.requires_grad and len(query_starts) > 2:
        return _attend_padded(query, key, value, query_starts, scale, alibi_slopes)
    outputs = [query[:0]]
    for first, end in pairwise(query_starts.tolist()):
        mask = None if alibi_slopes is None else alibi_bias(alibi_slopes, end - first, end - first).to(query.dtype)
        q, k, v = (x[first:end].transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, scale: float, alibi_slopes: Tensor | None
) -> Tensor:
    """Attend to all sequences as one batch, padded at their ends, where causality hides the padding.

    For training: the backward pass of an attention per sequence costs more than the padding.
    """
    starts = query_starts.long()
    lengths = starts.diff()
    longest = int(lengths.max())
    columns = torch.arange(longest, device=query.device)
    rows = (starts[:-1, None] + columns).clamp(max=len(query) - 1)  # [S, L]
    distance = columns[:, None] - columns  # [L, L]
    bias = query.new_zeros(()).float() if alibi_slopes is None else -alibi_slopes.float()[:, None, None] * distance
    bias = bias.expand(query.shape[1], longest, longest).masked_fill(distance < 0, float("-inf"))
    group = query.shape[1] // key.shape[1]
    q = query[rows].transpose(1, 2)  # [S, H, L, K]
    k, v = (x[rows].transpose(1, 2).repeat_interleave(group, 1) for x in (key, value))
    weights = ((q @ k.transpose(-1, -2)) * scale + bias.to(q.dtype)).softmax(-1, dtype=torch.float32).to(v.dtype)
    out = (weights @ v).transpose(1, 2)  # [S, L, H, K]
    return out[columns < lengths[:, None]]
