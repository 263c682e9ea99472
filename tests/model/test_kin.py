"""The kin of a frame against its definition, as coordinates of the features, in folders and in a resampler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import ConfigError, FlamingoConfig, KinConfig, fingerprint, from_dict
from model.folder import load_folder, save_folder
from model.kin import COMPONENTS, Kin, principal_components
from tests.tiny_models import CONFIGS, KIN_CONFIG, byte_tokenizer, tiny_model

VISION, SIZES = KIN_CONFIG.vision, KIN_CONFIG.vision.kin


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_kin_of_a_frame_follows_its_features() -> None:
    encoder = tiny_model(KIN_CONFIG).vision
    features = encoder(pictures(2))
    assert features.shape == (2, VISION.num_patches, VISION.feature_dim + SIZES.dim)
    plain = encoder.plain_features(pictures(2))
    assert torch.equal(features[..., : VISION.feature_dim], plain)
    kin, kins = encoder.kin, features[..., VISION.feature_dim :]
    assert kin is not None
    for frame, coordinates in zip(plain, kins, strict=True):
        probabilities = (kin.weight @ frame.mean(0) + kin.bias).softmax(0)
        ancestors = torch.stack([probabilities[below > 0].sum().sqrt() for below in kin.ancestors])
        expected = (kin.components @ ancestors).expand(VISION.num_patches, -1)
        torch.testing.assert_close(coordinates, expected, atol=1e-5, rtol=1e-5)
    assert (kins[0] - kins[1]).abs().max() > 1e-2


def test_features_that_have_kin_stay_as_they_are() -> None:
    encoder = tiny_model(KIN_CONFIG).vision
    features = encoder(pictures(1))
    assert encoder.with_kin(features) is features
    torch.testing.assert_close(encoder.with_kin(encoder.plain_features(pictures(1))), features)
    plain = tiny_model(CONFIGS["flamingo"]).vision
    assert torch.equal(plain(pictures(1)), plain.plain_features(pictures(1)))


def test_kin_changes_visual_tokens() -> None:
    model = tiny_model(KIN_CONFIG)
    before = model.encode_media(pictures(2)[:, None])
    assert model.vision.kin is not None
    model.vision.kin.components.mul_(2)
    assert (model.encode_media(pictures(2)[:, None]) - before).abs().max() > 1e-3


def test_a_folder_without_kin_has_no_tensor_and_needs_no_key_of_it() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    assert not [name for name in model.state_dict() if "kin" in name]
    values = json.loads(model.config.to_json())
    del values["vision"]["kin"]
    assert from_dict(FlamingoConfig, values) == model.config


def test_a_folder_keeps_kin_and_is_known_by_it(tmp_path: Path) -> None:
    tensors = tiny_model(KIN_CONFIG).state_dict()
    for name, changed in (("first", tensors), ("second", tensors | {COMPONENTS: tensors[COMPONENTS] + 1})):
        save_folder(tmp_path / name, KIN_CONFIG, changed.items(), byte_tokenizer().to_str())
    assert torch.equal(
        load_folder(tmp_path / "first", "cpu", torch.float32).state_dict()[COMPONENTS], tensors[COMPONENTS]
    )
    assert fingerprint(tmp_path / "first") != fingerprint(tmp_path / "second")


def test_kin_is_computed_in_float32_and_has_no_gradient() -> None:
    kin = Kin(SIZES, VISION.feature_dim).to(torch.bfloat16)
    features = torch.randn(1, 4, VISION.feature_dim, dtype=torch.bfloat16, requires_grad=True)
    assert kin.coordinates(features.mean(-2)).dtype == torch.float32
    kin(features)[..., : VISION.feature_dim].sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))  # type: ignore[arg-type]


def test_components_are_the_directions_in_which_classes_differ_most() -> None:
    """Classes differ in the first ancestor, fewer of them in the second, and in no other."""
    ancestors = torch.zeros(4, 8)
    ancestors[0, ::2] = 1
    ancestors[1, :1] = 1
    ancestors[2] = 1
    components = principal_components(ancestors, 2)
    torch.testing.assert_close(components @ components.T, torch.eye(2))
    assert components[0, 0].abs() > 0.9
    assert components[:, 2:].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 3, "num_classes": 5}, r"vision.kin has sizes \(3, 5, 0\), must be all positive or all zero"),
        ({"dim": 8, "num_classes": 5, "num_ancestors": 7}, "vision.kin.dim 8 is more than vision.kin.num_ancestors 7"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KinConfig(**sizes)


def test_a_resampler_without_a_projection_must_have_the_width_with_kin() -> None:
    with pytest.raises(ConfigError, match=r"resampler\.dim 16 differs from the width 19 of the vision features"):
        replace(CONFIGS["openflamingo"], vision=VISION)
