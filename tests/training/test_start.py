"""Tests of the model with which a run begins: another resolution, bridge, language model or input projection."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.config import ConfigError, KinConfig, VisionConfig
from model.kin import COMPONENTS
from model.likeness import LIKENESS, to_tensors
from model.zoo.bridge import start_bridge
from tests.tiny_models import CONFIGS, KIN_CONFIG, tiny_model
from tests.training.default.data import make_folder
from tests.training.toy import make_run
from training.bridge import is_bridge
from training.config import AblateConfig
from training.default.discriminants import fit_discriminants, random_rotation
from training.start import (
    BIAS,
    FRAMES,
    PROJECTION,
    at_resolution,
    interpolate_positions,
    with_ablated_bridge,
    with_added_kin,
    with_discriminants,
    with_free_weights,
    with_kin,
    with_new_language_model,
    with_scaled_frames,
)
from training.trainer import load_model

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
    """Return the vertical coordinate, between 0 and 1, of each position's centre, row by row."""
    heights = (torch.arange(side) + 0.5) / side
    return heights[:, None].expand(side, side).reshape(-1, 1)


def test_an_interpolated_ramp_stays_a_ramp() -> None:
    table = torch.cat([torch.tensor([[7.0]]), ramp(8)])
    out = interpolate_positions(table, 8, 16, 1)
    assert out[0] == 7.0
    # cubic interpolation keeps a line away from the border
    inner = out[1:].view(16, 16)[4:12, 4:12]
    torch.testing.assert_close(inner, ramp(16).view(16, 16)[4:12, 4:12], atol=5e-3, rtol=0)


@pytest.mark.parametrize("family", ["idefics", "flamingo"])
def test_a_higher_resolution_changes_only_the_position_tables(family: str) -> None:
    model = tiny_model(CONFIGS[family])  # type: ignore[index]
    finer = at_resolution(model, 12)
    num_class_tokens = int(model.config.vision.keep_class_token)
    assert finer.config.vision.num_patches == 9 + num_class_tokens
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


def test_a_convolutional_encoder_without_position_tables_gives_a_larger_map() -> None:
    config = replace(CONFIGS["flamingo"], vision=MAP)
    model = tiny_model(config)
    finer = at_resolution(model, 96)
    assert finer.config.vision.num_patches == finer.config.resampler.num_spatial == 9
    assert finer.vision(torch.randn(1, 3, 96, 96)).shape == (1, 9, 192)


def test_a_network_that_rounds_down_has_the_patches_that_it_computes() -> None:
    config = replace(CONFIGS["flamingo"], vision=replace(MAP, architecture="test_convnext", feature_dim=64))
    finer = at_resolution(tiny_model(config), 100)
    assert finer.config.vision.num_patches == finer.config.resampler.num_spatial == 9
    features = finer.vision(torch.randn(1, 3, 100, 100))
    assert features.shape == (1, 9, 64)
    assert finer.resampler(features[None]).isfinite().all()


def test_patches_that_do_not_form_a_square_are_refused() -> None:
    config = CONFIGS["flamingo"]
    wide = replace(config.vision, architecture="test_resnet", num_patches=6)
    model = tiny_model(config)
    model.config = replace(config, vision=wide, resampler=replace(config.resampler, num_spatial=0))
    with pytest.raises(ConfigError, match="image_size 16: 6 patches do not form a square"):
        at_resolution(model, 16)


def test_images_without_a_patch_are_refused_and_pixels_in_no_patch_are_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model(CONFIGS["flamingo"])
    with pytest.raises(ConfigError, match="image_size is 3, must be at least 4, the side of the encoder's patches"):
        at_resolution(model, 3)
    at_resolution(model, 12)
    assert not caplog.messages
    assert at_resolution(model, 11).config.vision.num_patches == 4
    (warning,) = caplog.messages
    assert "image_size 11 is no multiple of 4" in warning
    assert "does not see the last 3 rows and columns" in warning


def test_free_weights_have_the_same_values() -> None:
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
def test_an_ablated_bridge_keeps_the_experts(ablate: AblateConfig) -> None:
    model = tiny_model(CONFIGS["flamingo"])
    ablated = with_ablated_bridge(model, ablate)
    changes = {name: value for name, value in asdict(ablate).items() if value}
    values = {**asdict(ablated.config.gated), "resampler": ablated.config.resampler.kind}
    assert {name: values[name] for name in changes} == changes
    before = model.state_dict()
    experts = {name for name in before if not is_bridge(name)}
    assert all(torch.equal(before[name], ablated.state_dict()[name]) for name in experts)
    assert {name for name in ablated.state_dict() if not is_bridge(name)} == experts


def test_an_untrained_bridge_has_output_rows_for_the_new_tokens_of_an_untied_head() -> None:
    model = tiny_model(CONFIGS["idefics"])
    tensors = with_ablated_bridge(model, AblateConfig()).state_dict()
    for table in ("embed", "head"):
        mean = model.state_dict()[f"language_model.{table}.weight"].mean(0)
        assert all(torch.equal(row, mean) for row in tensors[f"language_model.{table}.new_rows"])


def test_an_empty_ablation_gives_the_usual_untrained_bridge() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    start = start_bridge(model.config, model.state_dict())
    tensors = with_ablated_bridge(model, AblateConfig()).state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in start.items())


def test_a_language_model_from_scratch_depends_on_the_seed_and_keeps_all_other_weights() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    first, repeated, different = (with_new_language_model(model, seed) for seed in (1, 1, 2))
    before, after = model.state_dict(), first.state_dict()
    assert all(torch.equal(tensor, repeated.state_dict()[name]) for name, tensor in after.items())
    matrix = "language_model.layers.0.attention.qkv.weight"
    assert not torch.equal(after[matrix], before[matrix])
    assert not torch.equal(after[matrix], different.state_dict()[matrix])
    kept_names = {name for name in before if not name.startswith("language_model.") or is_bridge(name)}
    assert all(torch.equal(before[name], after[name]) for name in kept_names)


def test_a_resampler_that_begins_with_discriminants_projects_features_to_them(tmp_path: Path) -> None:
    config = CONFIGS["flamingo"]
    config = replace(config, resampler=replace(config.resampler, dim=8, input_projection=True))
    model = with_ablated_bridge(tiny_model(config), AblateConfig())
    folder = make_folder(tmp_path)
    discriminants = fit_discriminants(folder, 8)
    changed = with_discriminants(model, folder)
    features = torch.randn(2, 3, config.vision.feature_dim)
    projected = changed.resampler.input(features) - model.resampler.input.bias
    expected = (features - discriminants.mean) @ discriminants.projection(8).T
    torch.testing.assert_close(projected, expected, atol=1e-4, rtol=1e-4)
    unchanged = model.state_dict().keys() - {"resampler.input.weight", "resampler.input.bias"}
    assert all(torch.equal(model.state_dict()[name], changed.state_dict()[name]) for name in unchanged)


def write_likeness(folder: Path, width: int) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Write a likeness of four classes; return their ancestors and the weights [4, width] of the classifier."""
    ancestors = np.eye(5, 4, dtype=bool)
    weight = np.random.default_rng(0).integers(-4, 5, size=(4, width)).astype(np.float32)
    save_file(to_tensors(ancestors, (1.0,), weight=weight, bias=np.arange(4, dtype=np.float32)), folder / LIKENESS)
    return ancestors, weight


def test_an_untrained_bridge_reads_kin_by_the_likeness_of_the_folder(tmp_path: Path) -> None:
    config = CONFIGS["flamingo"]
    width = config.vision.feature_dim
    ancestors, weight = write_likeness(tmp_path, width)
    model = tiny_model(config)
    changed = with_kin(model, tmp_path, 3)
    kin = changed.vision.kin
    assert changed.config.vision.kin == KinConfig(dim=3, num_classes=4, num_ancestors=5)
    assert kin is not None
    assert torch.equal(kin.weight, torch.from_numpy(weight))
    assert kin.ancestors.tolist() == ancestors.astype(float).tolist()
    assert changed.state_dict()["resampler.input.weight"].shape[1] == width + 3
    experts = {name for name in model.state_dict() if not is_bridge(name)}
    assert all(torch.equal(model.state_dict()[name], changed.state_dict()[name]) for name in experts)
    again = with_ablated_bridge(changed, AblateConfig())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in changed.state_dict().items())
    assert with_kin(changed, tmp_path, 2).state_dict()[COMPONENTS].shape == (2, 5)


def test_an_untrained_bridge_without_kin_reads_the_features_alone(tmp_path: Path) -> None:
    changed = with_kin(tiny_model(KIN_CONFIG), tmp_path, 0)
    assert changed.vision.kin is None
    assert changed.state_dict()[PROJECTION].shape[1] == KIN_CONFIG.vision.feature_dim


def test_kin_is_added_to_a_trained_bridge_along_directions_of_its_own(tmp_path: Path) -> None:
    resampler = replace(KIN_CONFIG.resampler, dim=16)
    config = replace(KIN_CONFIG, resampler=resampler, vision=replace(KIN_CONFIG.vision, kin=KinConfig()))
    model, data = tiny_model(config), make_folder(tmp_path)
    write_likeness(tmp_path, config.vision.feature_dim)
    changed = with_added_kin(model, tmp_path, 3, data)
    before, after = model.state_dict(), changed.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - {PROJECTION, BIAS})

    # an image whose kin is the mean of the training images gets the visual tokens that it had
    discriminants = fit_discriminants(data, 16, changed.vision.kin)
    features = torch.randn(2, config.vision.feature_dim)
    kin = discriminants.mean[-3:].expand(2, -1)
    projected = changed.resampler.input(torch.cat([features, kin], dim=1))
    torch.testing.assert_close(projected, model.resampler.input(features), atol=1e-5, rtol=1e-5)

    of_features, of_kin = discriminants.projection(16).split([config.vision.feature_dim, 3], dim=1)
    assert torch.equal(after[PROJECTION][:, -3:], of_kin)
    assert (of_kin.T @ of_features).abs().max() < 1e-5 < of_kin.norm(dim=0).min()


def test_kin_is_not_added_without_an_input_projection(tmp_path: Path) -> None:
    config = CONFIGS["flamingo"]
    write_likeness(tmp_path, config.vision.feature_dim)
    model = tiny_model(replace(config, resampler=replace(config.resampler, kind="mlp")))
    with pytest.raises(ConfigError, match="need a Perceiver with an input projection"):
        with_added_kin(model, tmp_path, 3, tmp_path)


def test_kin_is_not_added_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already reads 3 coordinates of kin"):
        with_added_kin(tiny_model(KIN_CONFIG), tmp_path, 3, tmp_path)


def test_embeddings_of_frames_are_scaled_and_nothing_else() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    before, after = model.state_dict(), with_scaled_frames(model, 50.0).state_dict()
    assert torch.equal(after.pop(FRAMES), 50 * before.pop(FRAMES))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_begins_with_the_scaled_embeddings_of_frames(tmp_path: Path) -> None:
    config = replace(make_run(tmp_path), bridge="start")
    plain, scaled = (load_model(replace(config, frame_scale=scale), Path(config.model)) for scale in (1.0, 50.0))
    assert torch.equal(50 * plain.state_dict()[FRAMES], scaled.state_dict()[FRAMES])


def test_embeddings_of_frames_that_do_not_exist_are_refused() -> None:
    config = CONFIGS["flamingo"]
    still = tiny_model(replace(config, resampler=replace(config.resampler, num_frames=0)))
    with pytest.raises(ConfigError, match="frame_scale needs a resampler with embeddings of frames"):
        with_scaled_frames(still, 50.0)


def test_kin_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kin needs the classes in likeness.safetensors, which .* does not have"):
        with_kin(tiny_model(CONFIGS["flamingo"]), tmp_path, 3)


def test_a_resampler_that_begins_with_discriminants_projects_kin_too(tmp_path: Path) -> None:
    config = replace(KIN_CONFIG, resampler=replace(KIN_CONFIG.resampler, dim=16))
    model, folder = tiny_model(config), make_folder(tmp_path)
    discriminants = fit_discriminants(folder, 16, model.vision.kin)
    changed = with_discriminants(model, folder)
    pixels = torch.randn(1, 3, 8, 8)
    features = changed.vision(pixels)
    projected = changed.resampler.input(features) - model.resampler.input.bias
    expected = discriminants(features) @ random_rotation(16, 0)[:, : len(discriminants.directions)].T
    assert len(discriminants.directions) == 16 // 4 + 3
    torch.testing.assert_close(projected, expected, atol=1e-4, rtol=1e-4)


def test_discriminants_without_an_input_projection_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["flamingo"]
    with pytest.raises(ConfigError, match="need a Perceiver with an input projection"):
        with_discriminants(tiny_model(replace(config, resampler=replace(config.resampler, kind="mlp"))), tmp_path)
