"""Networks of timm come with their weights and image settings; what the encoder cannot do is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from model.checkpoint.timm_models import convert_timm, load_timm_folder, timm_config
from model.config import ConfigError, VisionConfig
from model.folder import CheckpointError
from model.vision import VisionEncoder

SETTINGS: dict[str, Any] = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
CONFIG: dict[str, Any] = {"architecture": "test_resnet", "num_features": 80, "pretrained_cfg": SETTINGS}


def network(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **arguments).eval()
    return model


def changed(**settings: Any) -> dict[str, Any]:
    return {**CONFIG, "pretrained_cfg": {**SETTINGS, **settings}}


def test_image_settings_are_read_from_either_form_of_the_file() -> None:
    config = timm_config(CONFIG)
    assert (config.architecture, config.image_size, config.num_patches) == ("test_resnet", 96, 9)
    assert (config.mean, config.std, config.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "crop")
    assert timm_config({"architecture": "test_resnet", "num_classes": 7, **SETTINGS}) == config


@pytest.mark.parametrize(("mode", "resize"), [("center", "crop"), ("squash", "squash"), ("border", "pad")])
def test_the_form_of_the_square_is_that_of_the_crop(mode: str, resize: str) -> None:
    assert timm_config(changed(crop_mode=mode)).resize == resize


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_nfnet", "test_convnext"])
@torch.inference_mode()
def test_a_saved_network_gives_its_features(name: str, tmp_path: Path) -> None:
    saved = network(name, num_classes=3)
    timm.models.save_for_hf(saved, str(tmp_path / "network"), safe_serialization=True)
    config, tensors = load_timm_folder(tmp_path / "network")
    encoder = VisionEncoder(config)
    encoder.load_state_dict(tensors)
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    expected = saved.forward_features(pixels)  # type: ignore[operator]
    torch.testing.assert_close(encoder(pixels), expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_the_default_models_architecture_is_built_without_timm() -> None:
    tensors = network("tf_efficientnet_lite0").state_dict()
    config = timm_config({"architecture": "tf_efficientnet_lite0", "pretrained_cfg": None})
    assert (config.feature_dim, config.num_patches) == (1280, 49)
    VisionEncoder(config).load_state_dict(convert_timm(config, tensors))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(input_size=[3, 64, 96]), "input_size"),
        (changed(input_size=[1, 96, 96]), "input_size"),
        (changed(crop_mode="random"), "crop_mode = 'random'"),
        ({**CONFIG, "model_args": {"num_classes": 5, "stem_type": "deep"}}, "model_args = {'stem_type': 'deep'}"),
        ({**CONFIG, "architecture": "resnet_of_dreams"}, "is not a model of timm"),
        ({"architecture": "test_vit", "input_size": [3, 160, 160]}, "must be a channels-first map"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_settings_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as raised:
        timm_config(config)
    assert message in str(raised.value)


def test_misfits_are_listed_and_a_classifier_of_any_size_is_left_out() -> None:
    tensors = network("test_resnet", num_classes=5).state_dict()
    config: VisionConfig = timm_config(CONFIG)
    assert not [name for name in convert_timm(config, tensors) if "fc" in name]
    del tensors["conv1.0.weight" if "conv1.0.weight" in tensors else "conv1.weight"]
    tensors["stray"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"missing \(1\): conv1\..*unexpected \(1\): stray"):
        convert_timm(config, tensors)
