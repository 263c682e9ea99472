"""Visual tokens become the pages of all gated layers by one product: the layers' key and value maps stand in one matrix.

Where a LayerNorm stands before each map, all of them normalise alike: scale and shift go into the map. What normalises
keys stays behind the product. From then on a layer's own map is a part of the matrix, and the same function as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.norm import rms_norm
from model.cpu import FastLinear, OneDNN, Plain
from model.flamingo import Flamingo
from model.gated_cross_attention import GatedCrossAttention
from model.layers import LayerNorm, RMSNorm


class MediaProjection:
    """Visual tokens [M, R, Dv] -> pages [M, X, H, 2, R, K], a view of the product. Changes the model's layers in place."""

    @torch.no_grad()
    def __init__(self, model: Flamingo) -> None:
        layers = list(model.gated_layers().values())
        config, first = model.config.gated, layers[0]
        self._shape = (len(layers), 2, config.num_heads, config.head_dim)
        self._product = _stack(layers)
        self._media_norm = first.media_norm  # without scale and shift by now
        key_norms = [norm for layer in layers if (norm := layer.attention.key_norm) is not None]
        self._key_norms = _KeyNorms(key_norms) if key_norms else None

    def __call__(self, visual_tokens: Tensor) -> Tensor:
        kv: Tensor = self._product(self._media_norm(visual_tokens)).unflatten(-1, self._shape)  # [M, R, X, 2, H, K]
        if self._key_norms is not None:
            self._key_norms(kv[:, :, :, 0])
        return kv.permute(0, 2, 4, 3, 1, 5)


class _KeyNorms:
    """Keys of all layers [M, R, X, H, K]: in place, each normalised over K and scaled as its layer has it."""

    def __init__(self, norms: list[RMSNorm]) -> None:
        self._eps = norms[0].eps
        self._scale = torch.stack([norm.weight for norm in norms])[:, None].float()  # [X, 1, K]
        self._ones = torch.ones_like(self._scale[0, 0])

    def __call__(self, keys: Tensor) -> None:
        keys.copy_(rms_norm(keys.float(), self._ones, self._eps) * self._scale)


@dataclass(frozen=True, slots=True)
class _Map:
    weight: Tensor  # [2 * H * K, Dv], of all layers [X * 2 * H * K, Dv]
    bias: Tensor | None

    def rows(self, first: int, last: int) -> _Map:
        return _Map(self.weight[first:last], None if self.bias is None else self.bias[first:last])


def _stack(layers: list[GatedCrossAttention]) -> nn.Module:
    """The product for all layers, each of which keeps its part of it."""
    maps = [_folded(layer) for layer in layers]
    biases = [one.bias for one in maps if one.bias is not None]
    whole = _Map(torch.cat([one.weight for one in maps]), torch.cat(biases) if biases else None)
    size = len(maps[0].weight)
    for place, layer in enumerate(layers):
        own = _linear(whole.rows(place * size, (place + 1) * size), layer.attention.key_value)
        layer.attention.register_module("key_value", own)
    return _linear(whole, layers[0].attention.key_value)


def _folded(layer: GatedCrossAttention) -> _Map:
    """The layer's map, with its media norm's scale and shift, which the norm then has no more."""
    own, norm = _map(layer.attention.key_value), layer.media_norm
    if not isinstance(norm, LayerNorm) or norm.bias is None:
        return own
    layer.media_norm = LayerNorm(len(norm.weight), norm.eps).to(norm.weight).requires_grad_(False)
    weight, dtype = own.weight.float(), own.weight.dtype
    bias = weight @ norm.bias.float() + (0.0 if own.bias is None else own.bias.float())
    return _Map((weight * norm.weight.float()).to(dtype), bias.to(dtype))


def _map(linear: nn.Module) -> _Map:
    if isinstance(linear, nn.Linear):
        return _Map(linear.weight, linear.bias)
    assert isinstance(linear, FastLinear)
    product = next(reversed(linear.products.values()))  # the one for many rows, as a media has them
    assert isinstance(product, Plain | OneDNN)
    return _Map(product.weight if isinstance(product, Plain) else product.packed.to_dense(), product.bias)


def _linear(own: _Map, like: nn.Module) -> nn.Module:
    if isinstance(like, FastLinear):
        return FastLinear(own.weight, own.bias, [next(reversed(like.products))])
    linear = nn.Linear(own.weight.shape[1], own.weight.shape[0], bias=own.bias is not None, device="meta")
    linear.weight = nn.Parameter(own.weight, requires_grad=False)
    if own.bias is not None:
        linear.bias = nn.Parameter(own.bias, requires_grad=False)
    return linear
