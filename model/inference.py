"""Prepares a loaded model for inference, on every device: one call between `load_folder` and the engine.

One product with a stacked matrix projects visual tokens to the pages of all gated layers. If a LayerNorm precedes each
layer's map, all of them normalise in the same way, and their scales and shifts are folded into the maps. Norms of keys are
applied after the product. Each layer's own map becomes a view of the matrix, and its results stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.rows import rms_norm
from model import mapped_weights
from model.cpu import Choices, FastLinear, use_fast_formats
from model.flamingo import Flamingo, GatedCrossAttention
from model.layers import LayerNorm, RMSNorm
from model.products import FLOAT32, Format, OneDNN, Plain, Widened


class MediaProjection:
    """Projects visual tokens [M, R, Dv] to pages [M, X, H, 2, R, K]; changes the model's layers in place."""

    @torch.no_grad()
    def __init__(self, model: Flamingo) -> None:
        layers = list(model.gated_layers().values())
        config, first = model.config.gated, layers[0]
        self._shape = (len(layers), 2, config.num_heads, config.head_dim)
        self._product = _stack(layers)
        self._media_norm = first.media_norm  # without scale and shift, after folding
        key_norms = [norm for layer in layers if (norm := layer.attention.key_norm) is not None]
        self._key_norms = _KeyNorms(key_norms) if key_norms else None

    def __call__(self, visual_tokens: Tensor) -> Tensor:
        kv: Tensor = self._product(self._media_norm(visual_tokens)).unflatten(-1, self._shape)  # [M, R, X, 2, H, K]
        if self._key_norms is not None:
            self._key_norms(kv[:, :, :, 0])
        return kv.permute(0, 2, 4, 3, 1, 5)


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """A model that is prepared for inference, and the projection of its media."""

    flamingo: Flamingo
    project_media: MediaProjection
    formats: Choices  # empty if weights stay as loaded


def prepare_for_inference(
    model: Flamingo,
    layer_formats: Sequence[Format] = (),
    vision_formats: Sequence[Format] = FLOAT32,
    known: Choices | None = None,
) -> InferenceModel:
    """Fold the gates, convert matrices to the fastest of the formats, and stack the media projections, all in place.

    The formats, and the `known` choices between them, are passed to `use_fast_formats`, for a CPU; without formats, weights
    stay as loaded.
    """
    loaded = mapped_weights.addresses(model)
    model.fold_gates()
    formats = use_fast_formats(model, layer_formats, vision_formats, known) if layer_formats else {}
    prepared = InferenceModel(model, MediaProjection(model), formats)
    mapped_weights.release(model, loaded)
    return prepared


class _KeyNorms:
    """Normalises the keys of all layers [M, R, X, H, K] over K, in place, with each layer's scale."""

    def __init__(self, norms: list[RMSNorm]) -> None:
        self._eps = norms[0].eps
        self._scale = torch.stack([norm.weight for norm in norms])[:, None].float()  # [X, 1, K]
        self._ones = torch.ones_like(self._scale[0, 0])

    def __call__(self, keys: Tensor) -> None:
        keys.copy_(rms_norm(keys.float(), self._ones, self._eps) * self._scale)


@dataclass(frozen=True, slots=True)
class _Map:
    weight: Tensor  # [2 * H * K, Dv]; of all layers [X * 2 * H * K, Dv]
    bias: Tensor | None

    def rows(self, first: int, last: int) -> _Map:
        return _Map(self.weight[first:last], None if self.bias is None else self.bias[first:last])


def _stack(layers: list[GatedCrossAttention]) -> nn.Module:
    """Return one linear layer for the maps of all layers, and replace each layer's map by a view of its part."""
    maps = [_folded(layer) for layer in layers]
    biases = [layer_map.bias for layer_map in maps if layer_map.bias is not None]
    stacked = _Map(torch.cat([layer_map.weight for layer_map in maps]), torch.cat(biases) if biases else None)
    size = len(maps[0].weight)
    for index, layer in enumerate(layers):
        part = _linear(stacked.rows(index * size, (index + 1) * size), layer.attention.key_value)
        layer.attention.register_module("key_value", part)
    return _linear(stacked, layers[0].attention.key_value)


def _folded(layer: GatedCrossAttention) -> _Map:
    """Return the layer's map with the scale and shift of its media norm, which are removed from the norm."""
    layer_map, norm = _map(layer.attention.key_value), layer.media_norm
    if not isinstance(norm, LayerNorm) or norm.bias is None:
        return layer_map
    layer.media_norm = LayerNorm(len(norm.weight), norm.eps).to(norm.weight).requires_grad_(False)
    weight, dtype = layer_map.weight.float(), layer_map.weight.dtype
    bias = weight @ norm.bias.float() + (0.0 if layer_map.bias is None else layer_map.bias.float())
    return _Map((weight * norm.weight.float()).to(dtype), bias.to(dtype))


def _map(linear: nn.Module) -> _Map:
    if isinstance(linear, nn.Linear):
        return _Map(linear.weight, linear.bias)
    assert isinstance(linear, FastLinear)
    product = next(reversed(linear.products.values()))  # the last one is for many rows, as in media items
    assert isinstance(product, Plain | OneDNN | Widened)
    return _Map(product.weight, product.bias)


def _linear(layer_map: _Map, replaced: nn.Module) -> nn.Module:
    """Return a linear layer of the same kind as `replaced`."""
    weight, bias = layer_map.weight, layer_map.bias
    if isinstance(replaced, FastLinear):
        return FastLinear(weight, bias, [next(reversed(replaced.products))])
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
