"""The vision encoder: its features and their order; parts after them are not built, and training does not change it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torchvision.transforms import Compose, Normalize, ToTensor

from model.config import ConfigError, VisionConfig
from model.efficientnet import PackedConvolution
from model.presets.paper import NFNET_F6
from model.vision import VisionEncoder, normalise
from tests.vision_configs import EFFICIENTNET_LITE0, LAION_VIT_H_14, OPENAI_VIT_L_14, TINY_CLIP

PRESETS = {
    "vit_l_14": (OPENAI_VIT_L_14, 303.2e6),
    "vit_h_14": (LAION_VIT_H_14, 630.8e6),
    "lite0": (EFFICIENTNET_LITE0, 3.371e6),
    "nfnet_f6": (NFNET_F6, 435e6),
}
ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("timm", "torchvision", "torch._dynamo", "sympy")


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_have_their_shapes_and_sizes(name: str) -> None:
    config, num_parameters = PRESETS[name]
    with torch.device("meta"):
        encoder = VisionEncoder(config)
        features = encoder(torch.empty(2, 3, config.image_size, config.image_size))
    assert features.shape == (2, config.num_patches, config.feature_dim)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(num_parameters, rel=2e-3)


@pytest.mark.parametrize(
    ("config", "model"),
    [(OPENAI_VIT_L_14, "vit_large_patch14_clip_quickgelu_224"), (LAION_VIT_H_14, "vit_huge_patch14_clip_224")],
)
def test_clip_has_the_tensors_of_timm_without_the_last_norm(config: VisionConfig, model: str) -> None:
    with torch.device("meta"):
        expected = {name: t.shape for name, t in timm.create_model(model, num_classes=0).state_dict().items()}
        actual = {name: t.shape for name, t in VisionEncoder(config).encoder.state_dict().items()}
    assert expected.keys() - actual.keys() == {"norm.weight", "norm.bias"}
    assert actual == {name: expected[name] for name in actual}


@torch.no_grad()
def test_the_class_token_is_kept_or_dropped() -> None:
    kept = VisionEncoder(replace(TINY_CLIP, keep_class_token=True, num_patches=5))
    dropped = VisionEncoder(TINY_CLIP)
    dropped.load_state_dict(kept.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(kept(pixels)[:, 1:], dropped(pixels))


@torch.no_grad()
def test_a_map_becomes_tokens_row_by_row() -> None:
    encoder = VisionEncoder(replace(EFFICIENTNET_LITE0, image_size=96, num_patches=9))
    pixels = torch.randn(1, 3, 96, 96)
    feature_map = encoder.encoder.forward_features(pixels)
    features = encoder(pixels)
    for row in range(3):
        for column in range(3):
            expected = feature_map[0, :, row, column]
            torch.testing.assert_close(features[0, 3 * row + column], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_training_does_not_change_a_frozen_encoder() -> None:
    encoder = VisionEncoder(replace(EFFICIENTNET_LITE0, image_size=64, num_patches=4))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    model = torch.nn.Sequential(encoder).train()
    pixels = torch.randn(4, 3, 64, 64)
    features = model(pixels)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    torch.testing.assert_close(features[:1], model(pixels[:1]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_features_have_the_dtype_of_the_weights() -> None:
    encoder = VisionEncoder(TINY_CLIP).to(torch.bfloat16)
    assert encoder(torch.randn(1, 3, 28, 28)).dtype == torch.bfloat16


def test_normalise_equals_torchvision() -> None:
    config = replace(TINY_CLIP, mean=(0.48, 0.45, 0.40), std=(0.26, 0.27, 0.28))
    frames = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    transform = Compose([ToTensor(), Normalize(config.mean, config.std)])
    expected = torch.stack([transform(frame) for frame in frames])
    actual = normalise(torch.from_numpy(frames), config)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def test_lite0_sees_minus_one_to_one() -> None:
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 1, 3)
    assert normalise(black_and_white, EFFICIENTNET_LITE0).flatten(1).tolist() == [[-1.0] * 3, [1.0] * 3]


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ConfigError, match="'resnet_of_dreams'"):
        VisionEncoder(replace(EFFICIENTNET_LITE0, architecture="resnet_of_dreams"))


def test_a_tag_that_timm_does_not_have_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'test_resnet\.dreams' is not a model of timm"):
        VisionEncoder(replace(EFFICIENTNET_LITE0, architecture="test_resnet.dreams"))


def test_a_network_that_rounds_down_is_accepted() -> None:
    config = replace(EFFICIENTNET_LITE0, architecture="test_convnext", image_size=100, num_patches=9, feature_dim=64)
    with torch.inference_mode():
        assert VisionEncoder(config)(torch.randn(1, 3, 100, 100)).shape == (1, 9, 64)


def test_wrong_sizes_are_refused_with_both() -> None:
    with pytest.raises(ConfigError, match=r"\(1280, 49\).*\(1280, 64\)"), torch.device("meta"):
        VisionEncoder(replace(EFFICIENTNET_LITE0, num_patches=64))
    with pytest.raises(ConfigError, match=r"\(1280, 49\).*\(512, 49\)"), torch.device("meta"):
        VisionEncoder(replace(EFFICIENTNET_LITE0, feature_dim=512))


def test_folded_batch_norms_and_packed_convolutions_change_no_feature() -> None:
    encoder = VisionEncoder(EFFICIENTNET_LITE0)
    torch.manual_seed(8)
    for norm in (module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for tensor, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 0.5, 2), (norm.weight, 0.5, 1.5)):
            assert tensor is not None
            tensor.data.uniform_(low, high)
        norm.bias.data.uniform_(-1, 1)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = encoder(pixels)
        encoder.fold_batch_norms()
        after = encoder(pixels)
        encoder.pack_convolutions()
        packed = encoder(pixels)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules())
    assert any(isinstance(module, PackedConvolution) for module in encoder.modules())
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert float((packed - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("config", [EFFICIENTNET_LITE0, TINY_CLIP], ids=["lite0", "clip"])
def test_common_encoders_are_built_without_timm_and_torchs_compiler(config: VisionConfig) -> None:
    code = (
        "import sys, torch, server.engine.build; from model.config import KinConfig, VisionConfig; "
        "from model.flamingo import Flamingo; from model.vision import VisionEncoder; "
        "from model.zoo.default import DEFAULT\n"
        f"with torch.device('meta'): VisionEncoder({config!r}); Flamingo(DEFAULT)\n"
        f"VisionEncoder({config!r}).requires_grad_(False).fold_batch_norms()\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
