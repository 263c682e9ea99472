"""The resampler's attention: latents attend to [features; latents] (Flamingo, section 3.1), without concatenating them.

The number of features may vary: the patches of an image, or those of all frames of a video.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Launch, jit, jit_runtime, launch_config, tl, triton, use_triton
from kernels.tiles import (
    LOG2_E,
    add_key_gradients,
    add_query_gradient,
    block_width,
    load_tile,
    online_softmax,
    store_tile,
    with_equal_strides,
)


def resampler_attention_reference(
    query: Tensor, feature_key: Tensor, feature_value: Tensor, latent_key: Tensor, latent_value: Tensor, *, scale: float
) -> Tensor:
    key = torch.cat([feature_key, latent_key], 1).float()  # [M, N + R, H, K]
    value = torch.cat([feature_value, latent_value], 1).float()
    weights = (torch.einsum("mrhk,mnhk->mhrn", query.float(), key) * scale).softmax(-1)
    return torch.einsum("mhrn,mnhk->mrhk", weights, value).to(query.dtype)


@jit
def _step(q, keys, values, at, key_mask, columns, scale, top, total, out, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Add one block of keys to the online softmax."""
    k = load_tile(keys, at, key_mask, columns, K, BLOCK_K == K)  # [BLOCK_N, BLOCK_K]
    v = load_tile(values, at, key_mask, columns, K, BLOCK_K == K)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(key_mask[None, :], scores, float("-inf"))
    return online_softmax(scores, v, top, total, out)


@jit_runtime("num_features")
def _forward(
    query, feature_key, feature_value, latent_key, latent_value, out, lse, scale, feature_media_stride, feature_stride,
    latent_media_stride, latent_stride, num_features, num_heads, R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The latents of one media item and head attend to its features, then to the latents themselves."""
    media, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    keys, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_mask = rows < R
    query_at = rows[:, None] * num_heads * K + columns[None, :]
    first = (media * R * num_heads + head) * K
    q = load_tile(query + first, query_at, row_mask, columns, K, BLOCK_K == K)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    start = media * feature_media_stride + head * K
    for begin in range(0, num_features, BLOCK_N):
        key = begin + keys
        at = key[:, None] * feature_stride + columns[None, :]
        key_mask = key < num_features
        top, total, o = _step(
            q, feature_key + start, feature_value + start, at, key_mask, columns, scale, top, total, o, K, BLOCK_K
        )
    start = media * latent_media_stride + head * K
    for begin in range(0, R, BLOCK_N):
        key = begin + keys
        at = key[:, None] * latent_stride + columns[None, :]
        top, total, o = _step(
            q, latent_key + start, latent_value + start, at, key < R, columns, scale, top, total, o, K, BLOCK_K
        )
    store_tile(out + first, query_at, o / total[:, None], row_mask, columns, K, BLOCK_K == K)
    tl.store(lse + (media * R + rows) * num_heads + head, top + tl.log2(total), mask=row_mask)


@jit_runtime("num_features")
def _query_gradient(
    query, feature_key, feature_value, latent_key, latent_value, out, grad_out, lse, delta, grad_query, scale,
    log2_scale, feature_media_stride, feature_stride, latent_media_stride, latent_stride, num_features, num_heads,
    R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The query's gradient, in the order of the forward pass; delta, the sum over K of out * grad_out, is stored."""
    media, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    keys, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_mask = rows < R
    at_query = rows[:, None] * num_heads * K + columns[None, :]
    first = (media * R * num_heads + head) * K
    q = load_tile(query + first, at_query, row_mask, columns, K, BLOCK_K == K)
    o = load_tile(out + first, at_query, row_mask, columns, K, BLOCK_K == K)
    grad_o = load_tile(grad_out + first, at_query, row_mask, columns, K, BLOCK_K == K)
    row_delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), 1)
    row_at = (media * R + rows) * num_heads + head
    tl.store(delta + row_at, row_delta, mask=row_mask)
    row_lse = tl.load(lse + row_at, mask=row_mask, other=float("inf"))
    grad_q = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    start = media * feature_media_stride + head * K
    for begin in range(0, num_features, BLOCK_N):
        key = begin + keys
        at = key[:, None] * feature_stride + columns[None, :]
        key_mask = key < num_features
        k = load_tile(feature_key + start, at, key_mask, columns, K, BLOCK_K == K)
        v = load_tile(feature_value + start, at, key_mask, columns, K, BLOCK_K == K)
        grad_q = add_query_gradient(grad_q, q, grad_o, row_lse, row_delta, k, v, key_mask, scale, log2_scale)
    start = media * latent_media_stride + head * K
    for begin in range(0, R, BLOCK_N):
        key = begin + keys
        at = key[:, None] * latent_stride + columns[None, :]
        key_mask = key < R
        k = load_tile(latent_key + start, at, key_mask, columns, K, BLOCK_K == K)
        v = load_tile(latent_value + start, at, key_mask, columns, K, BLOCK_K == K)
        grad_q = add_query_gradient(grad_q, q, grad_o, row_lse, row_delta, k, v, key_mask, scale, log2_scale)
    store_tile(grad_query + first, at_query, grad_q, row_mask, columns, K, BLOCK_K == K)


@jit_runtime("num_keys")
def _key_gradients(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, scale, log2_scale, media_stride, stride, num_keys,
    num_heads, R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys, which are features or latents."""
    media, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keys = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    key_mask = keys < num_keys
    at = keys[:, None] * stride + columns[None, :]
    start = media * media_stride + head * K
    k = load_tile(key + start, at, key_mask, columns, K, BLOCK_K == K)
    v = load_tile(value + start, at, key_mask, columns, K, BLOCK_K == K)
    grad_k = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    first = (media * R * num_heads + head) * K
    for begin in range(0, R, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        row_mask = rows < R
        query_at = rows[:, None] * num_heads * K + columns[None, :]
        q = load_tile(query + first, query_at, row_mask, columns, K, BLOCK_K == K)
        grad_o = load_tile(grad_out + first, query_at, row_mask, columns, K, BLOCK_K == K)
        row_at = (media * R + rows) * num_heads + head
        row_lse = tl.load(lse + row_at, mask=row_mask, other=float("inf"))
        row_delta = tl.load(delta + row_at, mask=row_mask, other=0.0)
        grad_k, grad_v = add_key_gradients(grad_k, grad_v, k, v, q, grad_o, row_lse, row_delta, scale, log2_scale)
    grad_at = keys[:, None] * num_heads * K + columns[None, :]
    start = (media * num_keys * num_heads + head) * K
    store_tile(grad_key + start, grad_at, grad_k, key_mask, columns, K, BLOCK_K == K)
    store_tile(grad_value + start, grad_at, grad_v, key_mask, columns, K, BLOCK_K == K)


def _sizes(query: Tensor, config: Launch) -> dict[str, int]:
    _, num_latents, _, head_dim = query.shape
    return {"R": num_latents, "K": head_dim, "BLOCK": config.block, "BLOCK_N": 64, "BLOCK_K": block_width(head_dim)}


class _ResamplerAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        feature_key: Tensor,
        feature_value: Tensor,
        latent_key: Tensor,
        latent_value: Tensor,
        scale: float,
    ) -> Tensor:
        num_media, num_latents, num_heads, head_dim = query.shape
        config = launch_config("resampler", head_dim, query.dtype)
        out = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        _forward[(num_media, num_heads, triton.cdiv(num_latents, config.block))](
            query, feature_key, feature_value, latent_key, latent_value, out, lse, scale * LOG2_E,
            *feature_key.stride()[:2], *latent_key.stride()[:2], feature_key.shape[1], num_heads,
            **_sizes(query, config), **config.options,
        )  # fmt: skip
        ctx.save_for_backward(query, feature_key, feature_value, latent_key, latent_value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, *keys_and_values, out, lse = ctx.saved_tensors
        num_media, num_latents, num_heads, head_dim = query.shape
        config = launch_config("resampler_backward", head_dim, query.dtype)
        sizes = _sizes(query, config)
        scales = (ctx.scale, ctx.scale * LOG2_E)
        grad_out, grad_query, delta = grad_out.contiguous(), torch.empty_like(query), torch.empty_like(lse)
        strides = (*keys_and_values[0].stride()[:2], *keys_and_values[2].stride()[:2])
        _query_gradient[(num_media, num_heads, triton.cdiv(num_latents, config.block))](
            query, *keys_and_values, out, grad_out, lse, delta, grad_query, *scales, *strides,
            keys_and_values[0].shape[1], num_heads, **sizes, **config.options,
        )  # fmt: skip
        gradients: list[Tensor | None] = [grad_query]
        for key, value in (keys_and_values[:2], keys_and_values[2:]):
            num_keys = key.shape[1]
            grad_key, grad_value = query.new_empty(key.shape), query.new_empty(value.shape)
            _key_gradients[(num_media, num_heads, triton.cdiv(num_keys, sizes["BLOCK_N"]))](
                query, key, value, grad_out, lse, delta, grad_key, grad_value, *scales, *key.stride()[:2],
                num_keys, num_heads, **sizes, **config.options,
            )  # fmt: skip
            gradients += [grad_key, grad_value]
        return *gradients, None


def resampler_attention(
    query: Tensor, feature_key: Tensor, feature_value: Tensor, latent_key: Tensor, latent_value: Tensor, *, scale: float
) -> Tensor:
    """Attend to [features; latents]: query and latents [M, R, H, K], features [M, N, H, K] -> [M, R, H, K]."""
    if use_triton(query):
        features, latents = with_equal_strides(feature_key, feature_value), with_equal_strides(latent_key, latent_value)
        return _ResamplerAttention.apply(query.contiguous(), *features, *latents, scale)
    key = torch.cat([feature_key, latent_key], 1)
    value = torch.cat([feature_value, latent_value], 1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
