"""Attention maps: the attention of a token in the gated layers, traced back through the resampler to the patches.

They are computed by a forward without a cache. Attention rollout (Abnar and Zuidema, 2020) combines the layers of the
resampler into one map: half of each layer's output counts as its input, half as what it attended to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.media_attention import plan_media
from model.batch import MediaPages
from model.config import VisionConfig
from model.flamingo import Flamingo, GatedCrossAttention
from model.layered import LayeredForward
from model.vision import (
    MLPResampler,
    Resampler,
    ResamplerAttention,
    ResamplerLayer,
    TransformerLayer,
    TransformerResampler,
)

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Openness:
    """The two gates of a gated layer: tanh of a gate; for a vector, the mean absolute value."""

    layer: int  # the language-model layer that follows
    attention: float
    feed_forward: float


def openness(model: Flamingo) -> list[Openness]:
    """Return the openness of every gated layer."""
    return [Openness(layer, *gated.openness()) for layer, gated in model.gated_layers().items()]


@torch.inference_mode()
def media_weights(
    model: Flamingo,
    token_ids: Sequence[int],
    media_index: Sequence[int],
    media: MediaPages,
    token: int,
    layers: Collection[int],
    max_tokens: int,
) -> Generator[int, None, dict[int, Tensor]]:
    """Return, by gated layer, the attention of the token at position `token` to each visual token of its media item.

    Weights are [R] float32, the mean over heads, and sum to one, even if a token reads all previous media. Page m of
    `media` is media m. After each piece, yields the number of tokens that passed a layer, at most `max_tokens`.
    """
    assert media_index[token] >= 0
    forward = LayeredForward(model.language_model, [token_ids[: token + 1]], max_tokens)  # later tokens are not visible
    slots = torch.tensor(model.media_slots(media_index[: token + 1]), dtype=torch.int32, device=forward.x.device)
    plans = [plan_media(forward.x[span], slots[span], model.config.gated.head_dim) for span in forward.spans]
    first = 0 if model.config.gated.attends == "all_previous" else media_index[token]
    weights: dict[int, Tensor] = {}
    for i, gated, layer in model.layers():
        if gated is not None:
            pages = media.layer(i)
            if i in layers:
                weights[i] = _last_page_weights(gated, forward.x[token:], pages[first : media_index[token] + 1])
            if len(weights) == len(layers):
                break
            for span, plan in zip(forward.spans, plans, strict=True):
                forward.x[span] = gated(forward.x[span], pages, slots[span], plan)
                yield span.stop - span.start
        yield from forward.run(layer)
    return weights


def _last_page_weights(gated: GatedCrossAttention, x: Tensor, pages: Tensor) -> Tensor:
    """Return the weights [R] of one token [1, D] for the last of the pages that it reads [J, H, 2, R, K]."""
    attention = gated.attention
    query = attention.query(gated.attention_norm(x)).unflatten(-1, (-1, attention.head_dim)).float()[0]  # [H, K]
    if attention.query_norm is not None:
        query = attention.query_norm(query)
    scores = torch.einsum("hk,jhrk->hjr", query, pages[:, :, 0].float()) * attention.head_dim**-0.5
    last = scores.flatten(1).softmax(-1).view(scores.shape)[:, -1]  # [H, R]
    return _normalised(last.mean(0))


@torch.inference_mode()
def patch_shares(resampler: Resampler, features: Tensor) -> Tensor:
    """Return the share of each feature in each visual token: features [F, P, Dv] of one media item -> [R, F, P] float32.

    Each visual token's shares sum to one.
    """
    embedded = resampler.embed(features[None])  # [1, F * P, D]
    if isinstance(resampler, MLPResampler):
        shares = _averaged_shares(resampler, embedded)
    elif isinstance(resampler, TransformerResampler):
        shares = _shares_of_all(resampler, embedded)
    else:
        shares = rollout(_latent_maps(resampler, embedded), embedded.shape[1])
    return shares.unflatten(-1, features.shape[:2])


def _averaged_shares(resampler: Resampler, features: Tensor) -> Tensor:
    """Return the shares of the features in the means that the MLP reads; it has no attention."""
    identity = torch.eye(features.shape[1], device=features.device)
    return F.adaptive_avg_pool1d(identity[None], resampler.num_latents)[0].T


def _latent_maps(resampler: Resampler, features: Tensor) -> list[Tensor]:
    maps, latents = [], resampler.latents[None]
    for layer in resampler.layers:
        assert isinstance(layer, ResamplerLayer)
        maps.append(_latent_weights(layer.attention, latents, features))
        latents = layer(latents, features)
    return maps


def _latent_weights(attention: ResamplerAttention, latents: Tensor, features: Tensor) -> Tensor:
    """Return the weights [R, N + R] of [features; latents] for each latent, the mean over heads.

    latents [1, R, D], features [1, N, D].
    """
    latents = attention.latent_norm(latents)
    query = attention.query_norm(attention.heads(attention.query(latents)))
    keys = [attention.keys_and_values(x)[0] for x in (attention.media_norm(features), latents)]
    scores = torch.einsum("mrhk,mnhk->mhrn", query.float(), torch.cat(keys, 1).float()) * attention.head_dim**-0.5
    return scores.softmax(-1).mean(1)[0]


def rollout(maps: Sequence[Tensor], num_features: int) -> Tensor:
    """Return the share of each feature in each latent, [R, N], from each layer's weights of [features; latents].

    Weights are [R, N + R]. The share of the initial latents is left out, and the rest is normalised.
    """
    shares = maps[0].new_zeros(len(maps[0]), num_features)
    for weights in maps:
        shares = (shares + weights[:, :num_features] + weights[:, num_features:] @ shares) / 2
    return _normalised(shares)


def _shares_of_all(resampler: Resampler, features: Tensor) -> Tensor:
    """Return the shares by rollout for a resampler in which features attend, too."""
    num_features = features.shape[1]
    x = torch.cat([features, resampler.latents[None]], dim=1)  # [1, N + R, D]
    shares = torch.eye(x.shape[1], num_features, device=x.device)
    for layer in resampler.layers:
        assert isinstance(layer, TransformerLayer)
        query, key = layer.qkv(layer.norm(x)).unflatten(-1, (3, -1, layer.head_dim)).float()[0].unbind(1)[:2]
        weights = (torch.einsum("nhk,mhk->hnm", query, key) * layer.head_dim**-0.5).softmax(-1).mean(0)
        shares = (shares + weights @ shares) / 2
        x = layer(x)
    return _normalised(shares[num_features:])


def patch_grid(weights: Tensor, shares: Tensor, config: VisionConfig) -> Tensor:
    """Return the weights of the patches, [F, h, w], from those of visual tokens [R] and their `patch_shares` [R, F, P].

    They sum to one. A class token has no position and is left out.
    """
    grid = torch.einsum("r,rfp->fp", weights, shares)[:, int(config.keep_class_token) :]
    side = math.isqrt(grid.shape[1])
    return _normalised(grid.flatten()).view(-1, side, side)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp(min=TINY)
