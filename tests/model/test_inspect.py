"""Attention maps: weights by hand, a bridge that reads one patch, the outputs of the layers, and sums of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from model import inspect
from model.batch import NO_CACHE, MediaPages, whole_sequences
from model.config import FlamingoConfig, ResamplerConfig
from model.flamingo import Flamingo, GatedCrossAttention
from model.inspect import openness, patch_grid, patch_shares, rollout
from model.vision import PerceiverResampler, ResamplerLayer, TransformerLayer, TransformerResampler
from tests.tiny_models import CONFIGS, FAMILIES, RESAMPLER, VISION, Family, tiny_model

TOKENS = [257, 3, 4, 257, 5, 6, 7]
INDEX = [0, 0, 0, 1, 1, 1, 1]


def pictures(count: int, frames: int = 1) -> Tensor:
    return torch.randn(count, frames, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def media_weights(
    model: Flamingo,
    tokens: list[int],
    index: list[int],
    media: MediaPages,
    token: int,
    layers: Sequence[int],
    max_tokens: int = 100,
) -> dict[int, Tensor]:
    """Run all pieces, each within its bound, and return the weights."""
    pieces = inspect.media_weights(model, tokens, index, media, token, layers, max_tokens)
    while True:
        try:
            assert next(pieces) <= max_tokens
        except StopIteration as end:
            weights: dict[int, Tensor] = end.value
            return weights


def gated(model: Flamingo, layer: int) -> GatedCrossAttention:
    return model.gated_layers()[layer]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_those_of_the_attention(family: Family) -> None:
    """With unit vectors as values, the output of a head is its weights."""
    model = tiny_model(CONFIGS[family])
    config = model.config
    media = model.fresh_media(model.encode_media(pictures(2)))
    media.pages[:, :, :, 1] = 0
    media.pages[:, :, :, 1, :, : config.resampler.num_latents] = torch.eye(config.resampler.num_latents)
    read: dict[int, Tensor] = {}
    for layer in config.gated_layers:
        attention = gated(model, layer).attention
        attention.output.register_forward_pre_hook(lambda module, inputs, at=layer: read.update({at: inputs[0]}))
    model(whole_sequences([TOKENS], [model.media_slots(INDEX)]), NO_CACHE, media)
    for token in (2, 6):
        seen = media_weights(model, TOKENS, INDEX, media, token, config.gated_layers)
        assert tuple(seen) == config.gated_layers
        for layer, weights in seen.items():
            heads = read[layer][token].view(config.gated.num_heads, -1)[:, : config.resampler.num_latents]
            assert weights == pytest.approx(heads.mean(0), abs=1e-5)
            assert float(weights.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("attends", ["last", "all_previous"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_same_in_pieces_of_any_size(family: Family, attends: Literal["last", "all_previous"]) -> None:
    config = CONFIGS[family]
    model = tiny_model(replace(config, gated=replace(config.gated, attends=attends)))
    media = model.fresh_media(model.encode_media(pictures(3)))
    tokens, index = [257, *range(20)] * 3, [i // 21 for i in range(63)]
    whole = media_weights(model, tokens, index, media, 60, config.gated_layers)
    for max_tokens in (1, 7, 32):
        parts = media_weights(model, tokens, index, media, 60, config.gated_layers, max_tokens)
        assert list(parts) == list(whole)
        for layer, weights in parts.items():
            assert weights == pytest.approx(whole[layer], abs=1e-6)


def test_later_tokens_and_other_media_change_nothing() -> None:
    model = tiny_model(CONFIGS["idefics"])
    tokens = model.encode_media(pictures(2))
    alone = media_weights(model, TOKENS[:3], INDEX[:3], model.fresh_media(tokens[:1]), 2, model.config.gated_layers)
    among = media_weights(model, TOKENS, INDEX, model.fresh_media(tokens), 2, model.config.gated_layers)
    assert all(alone[layer] == pytest.approx(among[layer], abs=1e-6) for layer in alone)
    assert tuple(media_weights(model, TOKENS, INDEX, model.fresh_media(tokens), 2, [2])) == (2,)


def test_weights_sum_to_one_with_all_previous_media() -> None:
    config = CONFIGS["flamingo"]
    model = tiny_model(replace(config, gated=replace(config.gated, attends="all_previous")))
    media = model.fresh_media(model.encode_media(pictures(2)))
    media.pages[1, :, :, 0] = 0  # equal keys
    weights = media_weights(model, TOKENS, INDEX, media, 6, config.gated_layers)
    for shares in weights.values():
        assert shares == pytest.approx(torch.full((4,), 0.25))


def test_openness_is_the_same_for_folded_gates() -> None:
    model = tiny_model(CONFIGS["openflamingo"])
    first = gated(model, 1)
    assert first.attn_gate is not None
    assert first.ffw_gate is not None
    first.attn_gate.fill_(-0.5)
    first.ffw_gate.fill_(0)
    for _ in range(2):
        gates = {gate.layer: gate for gate in openness(model)}
        assert tuple(gates) == model.config.gated_layers
        assert gates[1].attention == pytest.approx(-0.46211716)
        assert gates[1].feed_forward == 0
        assert gates[3].attention > 0.4
        model.fold_gates()


def test_the_openness_of_a_vector_gate_is_its_mean_size() -> None:
    model = tiny_model(CONFIGS["idefics"])
    gate = gated(model, 0).attn_gate
    assert gate is not None
    gate.zero_()
    gate[: len(gate) // 2] = -20.0
    assert openness(model)[0].attention == pytest.approx(0.5)


# from visual tokens to patches


def one_layer(**fields: object) -> ResamplerConfig:
    return replace(RESAMPLER, num_layers=1, num_frames=0, **fields)  # type: ignore[arg-type]


def looking_at(patch: int) -> tuple[PerceiverResampler, Tensor]:
    """Return a resampler whose latents all match the key of one patch, and features with that patch."""
    config = one_layer(num_heads=1, head_dim=16)
    resampler = PerceiverResampler(config, 16).eval().requires_grad_(False)
    layer = resampler.layers[0]
    assert isinstance(layer, ResamplerLayer)
    attention = layer.attention
    attention.query.weight.copy_(torch.eye(16) * 100)
    attention.key_value.weight[:16] = torch.eye(16)
    features = -torch.eye(16)[None, :4]  # [1, P, 16]
    features[0, patch] = torch.eye(16)[patch]
    resampler.latents.copy_(torch.eye(16)[patch].expand_as(resampler.latents))
    return resampler, features


@pytest.mark.parametrize("patch", range(4))
def test_a_bridge_that_reads_one_patch_has_its_map(patch: int) -> None:
    resampler, features = looking_at(patch)
    shares = patch_shares(resampler, features)
    grid = patch_grid(torch.full((RESAMPLER.num_latents,), 0.25), shares, VISION)
    expected = torch.zeros(4)
    expected[patch] = 1
    assert grid.shape == (1, 2, 2)
    assert grid.flatten() == pytest.approx(expected, abs=1e-4)


def test_an_identity_resampler_passes_weights_on() -> None:
    identity = torch.eye(4)[:, None]  # visual token r is patch r
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert patch_grid(shares, identity, VISION).flatten() == pytest.approx(shares)


def test_rollout_by_hand() -> None:
    first = torch.tensor([[0.5, 0.1, 0.4, 0.0], [0.0, 0.2, 0.3, 0.5]])  # two features, two latents
    second = torch.tensor([[0.2, 0.2, 0.6, 0.0], [0.0, 0.0, 1.0, 0.0]])
    first_shares = torch.tensor([[0.25, 0.05], [0.0, 0.1]])
    shares = (
        first_shares + torch.tensor([[0.2, 0.2], [0.0, 0.0]]) + torch.tensor([[0.6, 0.0], [1.0, 0.0]]) @ first_shares
    ) / 2
    assert rollout([first], 2) == pytest.approx(first_shares / first_shares.sum(-1, keepdim=True))
    assert rollout([first, second], 2) == pytest.approx(shares / shares.sum(-1, keepdim=True))


def test_weights_of_latents_equal_those_of_the_resampler() -> None:
    """With one layer, one head and unit vectors as values, the output of the attention is its weights."""
    config = one_layer(num_heads=1, head_dim=8, num_latents=3, dim=16)
    resampler = PerceiverResampler(config, 16).eval().requires_grad_(False)
    resampler.latents.normal_()
    layer = resampler.layers[0]
    assert isinstance(layer, ResamplerLayer)
    features = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(3))
    values = torch.eye(4, 8), torch.zeros(3, 8)  # of features, of latents
    keys_and_values = layer.attention.keys_and_values

    def with_unit_values(x: Tensor) -> tuple[Tensor, Tensor]:
        key, _ = keys_and_values(x)
        return key, values[0 if x.shape[1] == 4 else 1][None, :, None]

    read: list[Tensor] = []
    layer.attention.keys_and_values = with_unit_values  # type: ignore[method-assign]
    layer.attention.output.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    resampler(features[None])
    expected = read[0][0, :, :4]
    shares = patch_shares(resampler, features)[:, 0]
    assert shares == pytest.approx(expected / expected.sum(-1, keepdim=True), abs=1e-5)


@pytest.mark.parametrize("kind", ["perceiver", "transformer", "mlp"])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_patches_sum_to_one(family: Family, frames: int, kind: str) -> None:
    config: FlamingoConfig = CONFIGS[family]
    qk_norm = config.resampler.qk_norm and kind == "perceiver"
    resampler = replace(config.resampler, kind=kind, qk_norm=qk_norm)  # type: ignore[arg-type]
    model = tiny_model(replace(config, resampler=resampler))
    features = model.features(pictures(1, frames))[0]
    shares = patch_shares(model.resampler, features)
    assert shares.shape == (4, frames, config.vision.num_patches)
    assert shares.sum((1, 2)) == pytest.approx(torch.ones(4), abs=1e-5)
    assert bool((shares >= 0).all())
    grid = patch_grid(torch.tensor([0.1, 0.2, 0.3, 0.4]), shares, config.vision)
    assert grid.shape == (frames, 2, 2)
    assert float(grid.sum()) == pytest.approx(1, abs=1e-5)


def test_an_mlps_tokens_read_their_own_patches() -> None:
    model = tiny_model(replace(CONFIGS["openflamingo"], resampler=replace(RESAMPLER, kind="mlp", num_latents=2)))
    shares = patch_shares(model.resampler, model.features(pictures(1))[0])
    assert shares[:, 0] == pytest.approx(torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))


def test_a_transformer_whose_latents_read_one_feature() -> None:
    config = one_layer(kind="transformer", num_heads=1, head_dim=16, num_latents=2)
    resampler = TransformerResampler(config, 16).eval().requires_grad_(False)
    layer = resampler.layers[0]
    assert isinstance(layer, TransformerLayer)
    layer.qkv.weight[:16] = torch.eye(16) * 100
    layer.qkv.weight[16:32] = torch.eye(16)
    features = torch.eye(16)[None, :4]
    resampler.latents.copy_(torch.eye(16)[2].expand(2, -1) + 0.01 * torch.eye(16)[10:12])
    shares = patch_shares(resampler, features)[:, 0]
    # half is kept of where a latent was, and of what it read its own part is no feature
    assert shares[:, 2] == pytest.approx(torch.ones(2), abs=1e-3)


def test_the_class_token_has_no_position() -> None:
    vision = CONFIGS["idefics"].vision
    patches = torch.tensor([[[0.6, 0.1, 0.1, 0.1, 0.1]]])
    assert patch_grid(torch.ones(1), patches, vision).flatten() == pytest.approx(torch.full((4,), 0.25))
