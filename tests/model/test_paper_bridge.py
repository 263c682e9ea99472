"""The bridge of the paper's family against its definition (sections 3.1.1 and 3.1.2), written out in plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.flamingo import Flamingo, GatedCrossAttention
from tests.tiny_models import CONFIGS, tiny_model

CONFIG = CONFIGS["flamingo"]
EPS = 1e-5
SLOTS = [-1, 0, 0, 1, -1]


class Weights:
    """The tensors of a module by their names below a prefix, and the operations that the paper names."""

    def __init__(self, model: Flamingo, prefix: str) -> None:
        tensors = model.state_dict()
        self.tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        return unit * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.down", F.relu(self.linear(f"{name}.up", x)) ** 2)

    def attend(self, name: str, x: Tensor, media: Tensor, num_heads: int) -> Tensor:
        """Attend from x [R, D] to media [N, Dv], both normalised."""
        key, value = self.linear(f"{name}.key_value", media).chunk(2, -1)
        return self.linear(f"{name}.output", attention(self.linear(f"{name}.query", x), key, value, num_heads))


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (num_heads, -1)) for part in (query, key, value))
    scores = torch.einsum("rhk,nhk->hrn", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hrn,nhk->rhk", scores.softmax(-1), v).flatten(-2)


def embedded(w: Weights, features: Tensor) -> Tensor:  # [F, P, Dv] -> [F * P, D]
    x = w.linear("input", features) + w.tensors["input.bias"]
    return (x + w.tensors["spatial_embeddings"] + w.tensors["frame_embeddings"][: len(x), None]).flatten(0, 1)


def resampled(model: Flamingo, features: Tensor) -> Tensor:  # [F, P, Dv] -> [R, D]
    w = Weights(model, "resampler.")
    x, latents = embedded(w, features), w.tensors["latents"]
    for number in range(CONFIG.resampler.num_layers):
        attend, feed_forward = f"layers.{number}.attention", f"layers.{number}.feed_forward"
        queries = w.norm(f"{attend}.latent_norm", latents)
        media = torch.cat([w.norm(f"{attend}.media_norm", x), queries])
        latents = latents + w.attend(attend, queries, media, CONFIG.resampler.num_heads)
        latents = latents + w.feed_forward(feed_forward, w.norm(f"{feed_forward}.norm", latents))
    return w.norm("norm", latents)


def transformed(model: Flamingo, features: Tensor) -> Tensor:
    """Return the visual tokens of the transformer that an ablation has in place of the resampler."""
    w = Weights(model, "resampler.")
    x = torch.cat([embedded(w, features), w.tensors["latents"]])
    for number in range(CONFIG.resampler.num_layers):
        layer = f"layers.{number}"
        query, key, value = w.linear(f"{layer}.qkv", w.norm(f"{layer}.norm", x)).chunk(3, -1)
        x = x + w.linear(f"{layer}.output", attention(query, key, value, CONFIG.resampler.num_heads))
        x = x + w.feed_forward(f"{layer}.feed_forward", w.norm(f"{layer}.feed_forward.norm", x))
    return w.norm("norm", x[-CONFIG.resampler.num_latents :])


def gated(model: Flamingo, layer: int, x: Tensor, visual_tokens: Tensor) -> Tensor:
    w = Weights(model, f"gated.{layer}.")
    queries, media = w.norm("attention_norm", x), w.norm("media_norm", visual_tokens)
    read = [
        w.attend("attention", queries[row : row + 1], media[slot], CONFIG.gated.num_heads)[0]
        if slot >= 0
        else torch.zeros_like(x[row])
        for row, slot in enumerate(SLOTS)
    ]
    x = x + torch.tanh(w.tensors["attn_gate"]) * torch.stack(read)
    return x + torch.tanh(w.tensors["ffw_gate"]) * w.feed_forward("feed_forward", w.norm("ffw_norm", x))


@pytest.mark.parametrize("kind", ["perceiver", "transformer"])
@pytest.mark.parametrize("num_frames", [1, 3])
def test_visual_tokens_are_those_of_the_definition(num_frames: int, kind: Literal["perceiver", "transformer"]) -> None:
    model = tiny_model(replace(CONFIG, resampler=replace(CONFIG.resampler, kind=kind)))
    features = 2 + torch.randn(2, num_frames, CONFIG.vision.num_patches, CONFIG.vision.feature_dim)
    define = resampled if kind == "perceiver" else transformed
    expected = torch.stack([define(model, item) for item in features])
    torch.testing.assert_close(model.resampler(features), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", CONFIG.gated_layers)
def test_a_gated_layer_is_that_of_the_definition(layer: int) -> None:
    model = tiny_model(CONFIG)
    x = 1 + 3 * torch.randn(len(SLOTS), CONFIG.language_model.dim)
    visual_tokens = 2 + 3 * torch.randn(2, CONFIG.resampler.num_latents, CONFIG.resampler.dim)
    pages = model.fresh_media(visual_tokens).layer(layer)
    actual = model.gated[str(layer)](x, pages, torch.tensor(SLOTS, dtype=torch.int32))
    torch.testing.assert_close(actual, gated(model, layer, x, visual_tokens), atol=1e-4, rtol=1e-4)


def test_the_gates_of_a_new_model_are_closed() -> None:
    kinds: tuple[Literal["scalar", "channel"], ...] = ("scalar", "channel")
    for gate in kinds:
        model = Flamingo(replace(CONFIG, gated=replace(CONFIG.gated, gate=gate)))
        gates = [parameter for name, parameter in model.named_parameters() if name.endswith("_gate")]
        assert len(gates) == 2 * len(CONFIG.gated_layers)
        assert not any(bool(parameter.any()) for parameter in gates)


@pytest.mark.parametrize("closed", ["attn_gate", "ffw_gate"])
def test_a_layer_with_one_open_gate_keeps_its_function_when_gates_are_folded(closed: str) -> None:
    layer = tiny_model(CONFIG).gated["0"]
    assert isinstance(layer, GatedCrossAttention)
    getattr(layer, closed).zero_()
    x, pages = torch.randn(len(SLOTS), CONFIG.language_model.dim), torch.randn(2, 2, 2, 4, 16)
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    before = layer(x, pages, slots)
    layer.fold_gates()
    torch.testing.assert_close(layer(x, pages, slots), before, atol=1e-5, rtol=1e-5)
