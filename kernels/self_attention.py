"""Operators of self-attention other than paged attention: rotary positions, the K/V store, and attention without a cache.

A rotation (RoFormer, half-split layout) turns the first `rotary_dim` elements of each head by the token's angle: it is
x * cos + (x with its halves swapped) * sin, where the first half's sines are negative.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import jit_runtime, launch_config, needs_gradients, tl, triton, use_compiled, use_triton
from kernels.compiled import compiled, inlined, load, store
from kernels.tiles import load_tile, rotary_partner, store_tile, with_equal_strides, with_whole_heads

ELEMENTS = 2048  # of queries and keys that one program rotates: loads of 16 bytes per thread on every target


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T, 1, rotary_dim] in float32; both halves hold the same angles."""
    angles = positions[:, None, None] * rotary_frequencies(rotary_dim, theta, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@cache
def rotary_frequencies(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor may take part in a backward pass later
        even = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
        return theta ** (-even / rotary_dim)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(width // 2, -1), sin)
    rotated, rest = x[..., :width], x[..., width:]
    rotated = torch.addcmul(rotated * cos, rotated.roll(width // 2, -1), sin)
    return torch.cat([rotated, rest], dim=-1)


@inlined
def rotate_heads(x, cos, sin, first, angle, num_heads, head_dim, rotary_dim):
    half = rotary_dim // 2
    for head in range(first, first + num_heads * head_dim, head_dim):
        for i in range(half):
            low, high = load(x, head + i), load(x, head + half + i)
            store(x, head + i, low * load(cos, angle + i) + high * load(sin, angle + i))
            store(x, head + half + i, high * load(cos, angle + half + i) + low * load(sin, angle + half + i))


@compiled("T* T* T* int int int int int")
def _rotate_rows(x, cos, sin, num_tokens, stride, num_heads, head_dim, rotary_dim):
    for row in range(num_tokens):
        rotate_heads(x, cos, sin, row * stride, row * rotary_dim, num_heads, head_dim, rotary_dim)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [T, H, K] rotated; x may be overwritten, unless a gradient needs it.

    cos and sin [T, 1, rotary_dim] are those of `rotary_angles`, in x's dtype.
    """
    num_tokens, num_heads, head_dim = x.shape
    if not use_compiled(x) or x.stride()[1:] != (head_dim, 1):
        return rotate_reference(x, cos, sin)
    _rotate_rows[x.dtype](
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), num_tokens, x.stride(0), num_heads, head_dim, cos.shape[-1]
    )
    return x


def kv_store_reference(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    block_size = kv_cache.shape[3]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            kv_cache[block, 0, :, offset] = key[row]
            kv_cache[block, 1, :, offset] = value[row]


@jit_runtime("slots")
def _store_token(
    key, value, kv_cache, slots, key_stride, value_stride, block_stride, G: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    index = tl.arange(0, BLOCK)
    mask = index < G * K
    to = kv_cache + slot // B * block_stride + index // K * B * K + slot % B * K + index % K
    tl.store(to, tl.load(key + row * key_stride + index, mask=mask), mask=mask)
    tl.store(to + G * B * K, tl.load(value + row * value_stride + index, mask=mask), mask=mask)


def _store_triton(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    _, num_kv_heads, head_dim = key.shape
    key, value = with_whole_heads(key), with_whole_heads(value)
    _store_token[(len(key),)](
        key, value, kv_cache, slot_mapping, key.stride(0), value.stride(0), kv_cache.stride(0), G=num_kv_heads,
        B=kv_cache.shape[3], K=head_dim, BLOCK=triton.next_power_of_2(num_kv_heads * head_dim),
        **launch_config("row", head_dim, key.dtype).options,
    )  # fmt: skip


@inlined
def store_token(key, value, kv_cache, key_at, value_at, target, num_heads, block_size, head_dim):
    """Copy one token's key from `key_at` and value from `value_at`; `target` is the offset of the key in the cache."""
    for head in range(num_heads):
        to = target + head * block_size * head_dim
        for i in range(head_dim):
            kv_cache[to + i] = key[key_at + head * head_dim + i]
            kv_cache[to + num_heads * block_size * head_dim + i] = value[value_at + head * head_dim + i]


@compiled("T* T* T* int64* int int int int int int")
def _store_rows(key, value, kv_cache, slots, num_tokens, stride, block_stride, num_heads, block_size, head_dim):
    for row in range(num_tokens):
        if slots[row] >= 0:
            target = slots[row] // block_size * block_stride + slots[row] % block_size * head_dim
            store_token(key, value, kv_cache, row * stride, row * stride, target, num_heads, block_size, head_dim)


def _store_compiled(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    num_tokens, num_heads, head_dim = key.shape
    key, value = with_equal_strides(key, value)
    _store_rows[key.dtype](
        key.data_ptr(), value.data_ptr(), kv_cache.data_ptr(), slot_mapping.data_ptr(), num_tokens, key.stride(0),
        kv_cache.stride(0), num_heads, kv_cache.shape[3], head_dim,
    )  # fmt: skip


def _store_in_torch(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    if bool((slot_mapping < 0).any()):
        real = slot_mapping >= 0
        key, value, slot_mapping = key[real], value[real], slot_mapping[real]
    block_size = kv_cache.shape[3]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv_cache[blocks, 0, :, offsets] = key
    kv_cache[blocks, 1, :, offsets] = value


def is_contiguous_in_blocks(kv_cache: Tensor) -> bool:
    """Return whether each block is contiguous, as in one layer's part of a cache; there may be gaps between blocks."""
    _, _, num_heads, block_size, head_dim = kv_cache.shape
    inner = (num_heads * block_size * head_dim, block_size * head_dim, head_dim, 1)
    return kv_cache.stride()[1:] == inner


def kv_store(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store key, value [T, G, K] in kv_cache [N, 2, G, B, K], in token_positions.

    slot_mapping [T] int64 holds block * B + offset; slot -1 (padding) is skipped.
    """
    if use_triton(key):
        _store_triton(key, value, kv_cache, slot_mapping)
    elif use_compiled(key, value) and is_contiguous_in_blocks(kv_cache):
        _store_compiled(key, value, kv_cache, slot_mapping)
    else:
        _store_in_torch(key, value, kv_cache, slot_mapping)


def rotate_and_store_reference(
    heads: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, kv_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    num_kv_heads = value.shape[1]
    rotated = heads if cos is None or sin is None else rotate_reference(heads, cos, sin)
    kv_store_reference(rotated[:, -num_kv_heads:], value, kv_cache, slot_mapping)
    return rotated[:, :-num_kv_heads]


@jit_runtime("slots")
def _rotate_and_store(
    heads, value, cos, sin, slots, query, kv_cache, stride, value_stride, block_stride, H: tl.constexpr, G: tl.constexpr,
    B: tl.constexpr, K: tl.constexpr, ROTARY: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK_H heads of one token, queries and keys, and store the keys with their values.

    The rotated queries are written to other memory, because a thread may read an element after another one rotated it.
    """
    EVEN: tl.constexpr = BLOCK_K == K
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    at, mask, kv_head = (head * K)[:, None], head < H + G, head - H
    is_key = mask & (kv_head >= 0)
    angle, is_rotated = row * ROTARY + columns, columns < ROTARY
    heads += row * stride
    x = load_tile(heads, at + columns[None, :], mask, columns, K, EVEN).to(tl.float32)
    other = load_tile(heads, at + rotary_partner(columns, ROTARY)[None, :], mask, columns, K, EVEN).to(tl.float32)
    v = load_tile(value + row * value_stride, (kv_head * K)[:, None] + columns[None, :], is_key, columns, K, EVEN)
    cosine = tl.load(cos + angle, mask=is_rotated, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=is_rotated, other=0.0).to(tl.float32)
    y = x * cosine[None, :] + other * sine[None, :]
    store_tile(query + row * H * K, at + columns[None, :], y, head < H, columns, K, EVEN)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    kv_cache += slot // B * block_stride + slot % B * K
    to = (kv_head * B * K)[:, None] + columns[None, :]
    store_tile(kv_cache, to, y, is_key, columns, K, EVEN)
    store_tile(kv_cache + G * B * K, to, v, is_key, columns, K, EVEN)


def _rotate_and_store_triton(
    heads: Tensor, value: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    heads, value = with_whole_heads(heads), with_whole_heads(value)
    (num_tokens, num_heads, head_dim), num_kv_heads = heads.shape, value.shape[1]
    query = heads.new_empty(num_tokens, num_heads - num_kv_heads, head_dim)
    block_width = triton.next_power_of_2(head_dim)
    block = max(1, ELEMENTS // block_width)
    _rotate_and_store[(num_tokens, triton.cdiv(num_heads, block))](
        heads, value, cos.contiguous(), sin.contiguous(), slot_mapping, query, kv_cache, heads.stride(0), value.stride(0),
        kv_cache.stride(0), H=num_heads - num_kv_heads, G=num_kv_heads, B=kv_cache.shape[3], K=head_dim,
        ROTARY=cos.shape[-1], BLOCK_H=block, BLOCK_K=block_width, **launch_config("row", head_dim, heads.dtype).options,
    )  # fmt: skip
    return query


def rotate_and_store(
    heads: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, kv_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Rotate heads [T, H + G, K] of queries and keys, store the keys with value [T, G, K], and return the queries.

    cos and sin are as in `rotate_`, or None if positions are not rotary; heads may be overwritten. The cache and the slots
    are as in `kv_store`.
    """
    num_kv_heads = value.shape[1]
    if cos is not None and sin is not None:
        if use_triton(heads) and not needs_gradients(heads, value):
            return _rotate_and_store_triton(heads, value, cos, sin, kv_cache, slot_mapping)
        heads = rotate_(heads, cos, sin)
    query, key = heads.split_with_sizes([heads.shape[1] - num_kv_heads, num_kv_heads], dim=1)
    kv_store(key, value, kv_cache, slot_mapping)
    return query


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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    positions: Tensor | None = None,
    spans: Tensor | None = None,
    seen_positions: Tensor | None = None,
    seen_key: Tensor | None = None,
) -> Tensor:
    """Attend within each sequence: query [T, H, K]; key, value [T, G, K]; query_starts [S + 1], first rows -> [T, H, K].

    For training and the reference, in plain torch and differentiable; grouped heads and ALiBi are as in `paged_attention`.
    `spans`, `positions` and `seen_positions` [T] are those of `model.batch.Batch`, for sequences whose shots attend alone.
    `seen_key` [T, G, K] has the keys rotated to their seen positions, if these differ.
    """
    if spans is not None and positions is not None:
        seen = positions if seen_positions is None else seen_positions
        context = _SpanContext(positions, spans, seen, key if seen_key is None else seen_key)
        return _attend_padded(query, key, value, query_starts, scale, alibi_slopes, context)
    if needs_gradients(query) and len(query_starts) > 2:
        return _attend_padded(query, key, value, query_starts, scale, alibi_slopes)
    outputs = [query[:0]]
    for first, end in pairwise(query_starts.tolist()):
        mask = None if alibi_slopes is None else alibi_bias(alibi_slopes, end - first, end - first).to(query.dtype)
        q, k, v = (x[first:end].transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    scale: float,
    alibi_slopes: Tensor | None,
    context: _SpanContext | None = None,
) -> Tensor:
    """Attend to all sequences as one batch, padded at their ends, where causality hides the padding.

    For training: the backward pass of an attention per sequence costs more than the padding.
    """
    starts = query_starts.long()
    lengths = starts.diff()
    longest = int(lengths.max())
    columns = torch.arange(longest, device=query.device)
    rows = (starts[:-1, None] + columns).clamp(max=len(query) - 1)  # [S, L]
    hidden = columns[:, None] < columns  # [L, L]
    if context is None:
        distance = (columns - columns[:, None])[None]  # [1, L, L], key less query
    else:
        hidden = hidden | ~_are_readable(context.spans[rows])  # [S, L, L]
        distance = context.distances(rows)
    bias = distance[:, None].float() * (0.0 if alibi_slopes is None else alibi_slopes.float()[:, None, None])
    bias = bias.masked_fill(hidden.unsqueeze(-3), float("-inf"))
    group = query.shape[1] // key.shape[1]
    q = query[rows].transpose(1, 2)  # [S, H, L, K]
    k, v = (x[rows].transpose(1, 2).repeat_interleave(group, 1) for x in (key, value))
    products = q @ k.transpose(-1, -2)
    if context is not None and context.seen_key is not key:
        seen = context.seen_key[rows].transpose(1, 2).repeat_interleave(group, 1)
        products = torch.where(context.are_queries(rows)[:, None], q @ seen.transpose(-1, -2), products)
    weights = (products * scale + bias.to(q.dtype)).softmax(-1, dtype=torch.float32).to(v.dtype)
    out = (weights @ v).transpose(1, 2)  # [S, L, H, K]
    return out[columns < lengths[:, None]]


class _SpanContext(NamedTuple):
    """Sequences whose shots attend alone: the positions of tokens, and the positions at which queries see them."""

    positions: Tensor  # [T]
    spans: Tensor  # [T]
    seen_positions: Tensor  # [T]
    seen_key: Tensor  # [T, G, K]

    def are_queries(self, rows: Tensor) -> Tensor:  # [S, L] -> [S, L, 1]
        return (self.spans[rows] < 0)[:, :, None]

    def distances(self, rows: Tensor) -> Tensor:  # [S, L] -> [S, L, L], key less query
        positions, seen = self.positions[rows], self.seen_positions[rows]
        return torch.where(self.are_queries(rows), seen[:, None], positions[:, None]) - positions[:, :, None]


def _are_readable(spans: Tensor) -> Tensor:
    """Return which spans the tokens of each span read, [S, L] -> [S, L, L]: see `model.batch.Batch`."""
    query, key = spans[:, :, None], spans[:, None]
    return (key == query) | (key == 0) | ((query < 0) & (key > 0))
