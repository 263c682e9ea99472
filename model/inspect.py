"""What a token reads of its picture: the attention of the gated layers, carried back through the resampler to the patches.

A plain forward, without cache, that returns what it saw on its way. Several layers of the resampler become one map by
attention rollout (Abnar and Zuidema, 2020): each layer passes on half of what it was given and half of what it read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.media_attention import plan_media
from model.batch import MediaPages, whole_sequences
from model.config import VisionConfig
from model.flamingo import Flamingo
from model.gated_cross_attention import GatedCrossAttention
from model.resampler import Resampler, ResamplerAttention, ResamplerLayer
from model.resampler_ablations import MLPResampler, TransformerLayer, TransformerResampler

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Openness:
    """How far a gated layer's two gates are open: tanh, of a vector gate the mean absolute value."""

    layer: int
    attention: float
    feed_forward: float


def openness(model: Flamingo) -> list[Openness]:
    """Of every gated layer, named by the language-model layer behind it."""
    return [Openness(layer, *gated.openness()) for layer, gated in model.gated_layers().items()]


@torch.inference_mode()
def media_weights(
    model: Flamingo,
    token_ids: Sequence[int],
    media_index: Sequence[int],
    media: MediaPages,
    token: int,
    layers: Collection[int],
) -> dict[int, Tensor]:
    """By gated layer, how the token at position `token` shares its attention among the visual tokens of its media: [R],
    float32, the mean over heads, summing to one. Page m of `media` is media m.

    Where a token reads all previous media, what it gives to its own is taken as the whole.
    """
    assert media_index[token] >= 0
    device = next(model.parameters()).device
    slots = model.media_slots(media_index[: token + 1])  # what comes later is not seen
    batch = whole_sequences([token_ids[: token + 1]], [slots], device)
    x = model.language_model.embed_tokens(batch)  # [T, D]
    context = model.language_model.step_context(batch, x.dtype)
    plan = plan_media(x, batch.media_slot, model.config.gated.head_dim)
    first = 0 if model.config.gated.attends == "all_previous" else media_index[token]
    seen: dict[int, Tensor] = {}
    for i, gated, layer in model.layers():
        if gated is not None:
            pages = media.layer(i)
            if i in layers:
                seen[i] = _shares(gated, x[token:], pages[first : media_index[token] + 1])
            x = gated(x, pages, batch.media_slot, plan)
        x = layer(x, context, None)
    return seen


def _shares(gated: GatedCrossAttention, x: Tensor, pages: Tensor) -> Tensor:
    """One token [1, D] and the pages that it reads [J, H, 2, R, K] -> its shares of the last one's keys: [R]"""
    attention = gated.attention
    query = attention.query(gated.attention_norm(x)).unflatten(-1, (-1, attention.head_dim)).float()[0]  # [H, K]
    if attention.query_norm is not None:
        query = attention.query_norm(query)
    scores = torch.einsum("hk,jhrk->hjr", query, pages[:, :, 0].float()) * attention.head_dim**-0.5
    last = scores.flatten(1).softmax(-1).view(scores.shape)[:, -1]  # [H, R]
    return _to_one(last.mean(0))


@torch.inference_mode()
def patch_shares(resampler: Resampler, features: Tensor) -> Tensor:
    """What each visual token is made of: features [F, P, Dv] of one media -> [R, F, P] float32, each row summing to one."""
    embedded = resampler.embed(features[None])  # [1, F * P, D]
    if isinstance(resampler, MLPResampler):
        shares = _averaged_shares(resampler, embedded)
    elif isinstance(resampler, TransformerResampler):
        shares = _shares_of_all(resampler, embedded, resampler.latents)
    else:
        shares = rollout(_latent_maps(resampler, embedded, resampler.latents), embedded.shape[1])
    return shares.unflatten(-1, features.shape[:2])


def _averaged_shares(resampler: Resampler, features: Tensor) -> Tensor:
    """No attention at all: what the mean itself makes of each feature."""
    each = torch.eye(features.shape[1], device=features.device)
    return F.adaptive_avg_pool1d(each[None], resampler.num_latents)[0].T


def _latent_maps(resampler: Resampler, features: Tensor, latents: Tensor) -> list[Tensor]:
    maps, latents = [], latents[None]
    for layer in resampler.layers:
        assert isinstance(layer, ResamplerLayer)
        maps.append(_latent_weights(layer.attention, latents, features))
        latents = layer(latents, features)
    return maps


def _latent_weights(attention: ResamplerAttention, latents: Tensor, features: Tensor) -> Tensor:
    """[1, R, D], [1, N, D] -> the weights of [features; latents] for each latent, mean over heads: [R, N + R]"""
    latents = attention.latent_norm(latents)
    query = attention.query_norm(attention.heads(attention.query(latents)))
    keys = [attention.keys_and_values(x)[0] for x in (attention.media_norm(features), latents)]
    scores = torch.einsum("mrhk,mnhk->mhrn", query.float(), torch.cat(keys, 1).float()) * attention.head_dim**-0.5
    return scores.softmax(-1).mean(1)[0]


def rollout(maps: Sequence[Tensor], num_features: int) -> Tensor:
    """Each layer's weights of [features; latents], [R, N + R] -> what of each latent comes from each feature: [R, N]. What
    comes from the latents' own beginning is left out, and the rest taken as the whole."""
    carried = maps[0].new_zeros(len(maps[0]), num_features)
    for weights in maps:
        of_features, of_latents = weights[:, :num_features], weights[:, num_features:]
        carried = (carried + of_features + of_latents @ carried) / 2
    return _to_one(carried)


def _shares_of_all(resampler: Resampler, features: Tensor, latents: Tensor) -> Tensor:
    """The rollout where features attend too, all to all."""
    num_features = features.shape[1]
    x = torch.cat([features, latents[None]], dim=1)  # [1, N + R, D]
    carried = torch.eye(x.shape[1], num_features, device=x.device)
    for layer in resampler.layers:
        assert isinstance(layer, TransformerLayer)
        query, key = layer.qkv(layer.norm(x)).unflatten(-1, (3, -1, layer.head_dim)).float()[0].unbind(1)[:2]
        weights = (torch.einsum("nhk,mhk->hnm", query, key) * layer.head_dim**-0.5).softmax(-1).mean(0)
        carried = (carried + weights @ carried) / 2
        x = layer(x)
    return _to_one(carried[num_features:])


def picture_grid(shares: Tensor, patches: Tensor, config: VisionConfig) -> Tensor:
    """Shares of visual tokens [R] and what those are made of [R, F, P] -> shares of the patches [F, h, w], summing to
    one. A class token stands for no place and is left out."""
    grid = torch.einsum("r,rfp->fp", shares, patches)[:, int(config.keep_class_token) :]
    side = math.isqrt(grid.shape[1])
    return _to_one(grid.flatten()).view(-1, side, side)


def _to_one(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp(min=TINY)
