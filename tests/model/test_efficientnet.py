"""EfficientNet-Lite0: bit for bit timm's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

from model.efficientnet import Convolution, EfficientNetLite0, fold_batch_norms, pack_convolutions
from model.timm_encoders import fold
from model.vision import VisionEncoder
from model.zoo.default import DEFAULT


@pytest.fixture(scope="module")
def networks() -> tuple[EfficientNetLite0, Any]:
    """Return our network and timm's, with the same weights, whose batch norms do something."""
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="").eval()
    for norm in (module for module in theirs.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for statistic in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert statistic is not None
            torch.nn.init.uniform_(statistic, 0.5, 1.5)
    ours = EfficientNetLite0().eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("side", [64, 97])
@torch.inference_mode()
def test_the_map_is_that_of_timm(networks: tuple[EfficientNetLite0, Any], side: int) -> None:
    ours, theirs = networks
    pixels = torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours.forward_features(pixels), theirs.forward_features(pixels))


@torch.inference_mode()
def test_folding_is_that_of_timms_network_and_packing_only_rounds(
    networks: tuple[EfficientNetLite0, Any],
) -> None:
    ours, theirs = networks
    pixels = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    before = ours.forward_features(pixels)
    fold_batch_norms(ours)
    fold(theirs)
    after = ours.forward_features(pixels)
    assert torch.equal(after, theirs.forward_features(pixels))
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    assert not torch.equal(after, before)
    pack_convolutions(ours)
    assert not any(isinstance(module, Convolution | torch.nn.ReLU6) for module in ours.modules())
    for count, side in ((1, 64), (3, 97)):
        pixels = torch.randn(count, 3, side, side).contiguous(memory_format=torch.channels_last)
        packed, expected = ours.forward_features(pixels), theirs.forward_features(pixels)
        assert expected.amax() == 6  # the activation does something
        torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_weight_that_is_not_a_number_is_not_hidden_by_packing() -> None:
    """The activation of oneDNN turns NaN into a number: a damaged model would answer instead of failing."""
    network = EfficientNetLite0().eval()
    fold_batch_norms(network)
    network.get_parameter("blocks.2.0.conv_pw.weight")[3, 2] = torch.nan
    pack_convolutions(network)
    pixels = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert bool(network.forward_features(pixels).isnan().all())


def test_a_larger_efficientnet_is_timms() -> None:
    with torch.device("meta"):
        encoder = VisionEncoder(replace(DEFAULT.vision, architecture="tf_efficientnet_lite1"))
    assert type(encoder.encoder).__module__.startswith("timm.")
