"""The model that a run begins with: at another resolution its tables of places are stretched, and nothing else changes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from model.config import ConfigError, VisionConfig
from model.zoo.bridge import start_bridge
from tests.tiny_models import CONFIGS, tiny_model
from tests.training.default.data import make_folder
from training.bridge import is_bridge
from training.config import AblateConfig
from training.default.discriminants import fit_discriminants
from training.start import (
    at_resolution,
    stretched,
    with_ablated_bridge,
    with_discriminants,
    with_free_weights,
    with_new_language_model,
)

MAP = VisionConfig(
    architecture="test_nfnet",
    image_size=64,
    feature_dim=192,
    num_patches=4,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="squash",
)


def ramp(side: int) -> torch.Tensor:
    """Row by row the height of each place's middle, in 0..1."""
    heights = (torch.arange(side) + 0.5) / side
    return heights[:, None].expand(side, side).reshape(-1, 1)


def test_a_ramp_of_places_stays_a_ramp() -> None:
    table = torch.cat([torch.tensor([[7.0]]), ramp(8)])
    out = stretched(table, 8, 16, 1)
    assert out[0] == 7.0
    # a cubic keeps a line away from the border
    inner = out[1:].view(16, 16)[4:12, 4:12]
    torch.testing.assert_close(inner, ramp(16).view(16, 16)[4:12, 4:12], atol=5e-3, rtol=0)


@pytest.mark.parametrize("family", ["idefics", "flamingo"])
def test_a_finer_encoder_has_the_same_weights_but_for_its_places(family: str) -> None:
    model = tiny_model(CONFIGS[family])  # type: ignore[index]
    finer = at_resolution(model, 12)
    kept = model.config.vision.keep_class_token
    assert finer.config.vision.num_patches == 9 + kept
    before, after = model.state_dict(), finer.state_dict()
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed == {"vision.encoder.pos_embed"} | (
        {"resampler.spatial_embeddings"} if family == "flamingo" else set()
    )
    assert torch.equal(before["vision.encoder.pos_embed"][:, 0], after["vision.encoder.pos_embed"][:, 0])
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - changed)
    assert finer.encode_media(torch.randn(1, 1, 3, 12, 12)).isfinite().all()


def test_the_same_resolution_changes_nothing() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    same = at_resolution(model, 8)
    assert same.config == model.config
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_convolutional_encoder_has_no_places_and_gives_a_larger_map() -> None:
    config = replace(CONFIGS["flamingo"], vision=MAP)
    model = tiny_model(config)
    finer = at_resolution(model, 96)
    assert finer.config.vision.num_patches == finer.config.resampler.num_spatial == 9
    assert finer.vision(torch.randn(1, 3, 96, 96)).shape == (1, 9, 192)


def test_patches_that_are_no_square_are_refused() -> None:
    config = CONFIGS["flamingo"]
    wide = replace(config.vision, architecture="odd", num_patches=6)
    model = tiny_model(config)
    model.config = replace(config, vision=wide, resampler=replace(config.resampler, num_spatial=0))
    model.vision.encoder.feature_info = [{"reduction": 4}]
    with pytest.raises(ConfigError, match="image_size 16: 6 patches are no square"):
        at_resolution(model, 16)


def test_free_weights_are_the_same_numbers() -> None:
    config = CONFIGS["flamingo"]
    model = tiny_model(replace(config, language_model=replace(config.language_model, weights="q4")))
    free = with_free_weights(model)
    assert free.config == config
    assert all(torch.equal(tensor, free.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "ablate",
    [
        AblateConfig(resampler="mlp"),
        AblateConfig(resampler="transformer"),
        AblateConfig(gate="none"),
        AblateConfig(attends="all_previous", interval=2),
    ],
    ids=lambda ablate: "-".join(str(value) for value in asdict(ablate).values() if value),
)
def test_an_ablated_bridge_stands_between_the_same_experts(ablate: AblateConfig) -> None:
    model = tiny_model(CONFIGS["flamingo"])
    other = with_ablated_bridge(model, ablate)
    asked = {name: value for name, value in asdict(ablate).items() if value}
    found = {**asdict(other.config.gated), "resampler": other.config.resampler.kind}
    assert {name: found[name] for name in asked} == asked
    before = model.state_dict()
    experts = {name for name in before if not is_bridge(name)}
    assert all(torch.equal(before[name], other.state_dict()[name]) for name in experts)
    assert {name for name in other.state_dict() if not is_bridge(name)} == experts


def test_nothing_ablated_is_the_start_that_every_run_has() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    start = start_bridge(model.config, model.language_model.embed.weight)
    found = with_ablated_bridge(model, AblateConfig()).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in start.items())


def test_a_language_model_from_scratch_is_random_the_same_again_and_all_that_changes() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    one, again, other = (with_new_language_model(model, seed) for seed in (1, 1, 2))
    before, after = model.state_dict(), one.state_dict()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in after.items())
    matrix = "language_model.layers.0.attention.qkv.weight"
    assert not torch.equal(after[matrix], before[matrix])
    assert not torch.equal(after[matrix], other.state_dict()[matrix])
    kept = {name for name in before if not name.startswith("language_model.") or is_bridge(name)}
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_a_resampler_that_begins_with_discriminants_reads_them(tmp_path: Path) -> None:
    config = CONFIGS["flamingo"]
    config = replace(config, resampler=replace(config.resampler, dim=8, input_projection=True))
    model = with_ablated_bridge(tiny_model(config), AblateConfig())
    folder = make_folder(tmp_path)
    found = fit_discriminants(folder, 8)
    begun = with_discriminants(model, folder)
    features = torch.randn(2, 3, config.vision.feature_dim)
    around = begun.resampler.input(features) - model.resampler.input.bias
    torch.testing.assert_close(around, (features - found.mean) @ found.spread(8).T, atol=1e-4, rtol=1e-4)
    same = model.state_dict().keys() - {"resampler.input.weight", "resampler.input.bias"}
    assert all(torch.equal(model.state_dict()[name], begun.state_dict()[name]) for name in same)


def test_discriminants_need_a_projection_that_reads_these_features(tmp_path: Path) -> None:
    config = CONFIGS["flamingo"]
    with pytest.raises(ConfigError, match="need a Perceiver with an input projection"):
        with_discriminants(tiny_model(replace(config, resampler=replace(config.resampler, kind="mlp"))), tmp_path)
