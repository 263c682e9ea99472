"""Converted vision encoders give the features of transformers, whichever library wrote the file.

The tower of an OpenFlamingo golden exists in both spellings, which must become the same tensors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.idefics.configuration_idefics import IdeficsVisionConfig
from transformers.models.idefics.vision import IdeficsVisionTransformer

from model.checkpoint.files import read_pickle
from model.checkpoint.vision_models import (
    HUGGING_FACE,
    _check_preprocessor,
    clip_config,
    convert_clip,
    convert_efficientnet_lite,
    load_clip_folder,
    open_clip_config,
)
from model.config import VisionConfig
from model.folder import CheckpointError
from model.vision import VisionEncoder
from model.zoo.default import expert_files
from tests.vision_configs import EFFICIENTNET_LITE0, LAION_VIT_H_14, OPENAI_VIT_L_14

GOLDENS = Path(__file__).parents[2] / "goldens" / "openflamingo"
WEIGHTS = "model.safetensors"
SIZES: dict[str, Any] = {
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * 1.2 / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.2 * noise + name.endswith("weight"))
    module.eval()


def ours(config: VisionConfig, tensors: dict[str, Tensor]) -> VisionEncoder:
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    encoder.load_state_dict(tensors, assign=True)
    return encoder


def pixels(size: int = 28) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_patches_of_clip(hidden_act: str) -> None:
    oracle = CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_size=24, hidden_act=hidden_act))
    randomise(oracle)
    settings = oracle.config.to_dict()
    encoder = ours(clip_config(settings), convert_clip(clip_config(settings), oracle.state_dict(), HUGGING_FACE))
    expected = oracle(pixels()).last_hidden_state
    torch.testing.assert_close(encoder(pixels()), expected[:, 1:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_every_token_of_idefics() -> None:
    settings = IdeficsVisionConfig(**SIZES, embed_dim=24, layer_norm_eps=1e-3)
    settings._attn_implementation = "eager"
    oracle = IdeficsVisionTransformer(settings)
    randomise(oracle)
    as_clip = {**settings.to_dict(), "model_type": "clip_vision_model", "hidden_size": 24}
    tensors = {f"model.vision_model.{name}": tensor for name, tensor in oracle.state_dict().items()}
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(2, 2)  # the language model's, in the same file
    config = replace(clip_config(as_clip), keep_class_token=True, num_patches=5)
    encoder = ours(config, convert_clip(clip_config(as_clip), tensors, HUGGING_FACE))
    torch.testing.assert_close(encoder(pixels()), oracle(pixels()).last_hidden_state, atol=1e-4, rtol=0)


def test_whole_clip_and_its_encoder_alone_convert_to_the_same() -> None:
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=SIZES | {"hidden_size": 24}, projection_dim=4))
    settings = whole.config.to_dict()
    assert clip_config(settings) == clip_config(settings["vision_config"])
    from_whole = convert_clip(clip_config(settings), whole.state_dict(), HUGGING_FACE)
    tower = {n.removeprefix("vision_model."): t for n, t in whole.state_dict().items() if n.startswith("vision_model.")}
    alone = convert_clip(clip_config(settings["vision_config"]), tower, HUGGING_FACE)
    assert from_whole.keys() == alone.keys()
    assert all(torch.equal(from_whole[name], alone[name]) for name in alone)


@torch.no_grad()
def test_transformers_and_open_clip_files_convert_to_the_same() -> None:
    config, open_clip = load_clip_folder(GOLDENS / "open_clip")
    other_config, hugging_face = load_clip_folder(GOLDENS / "clip")
    assert config == other_config
    assert open_clip.keys() == hugging_face.keys()
    assert all(torch.equal(open_clip[name].float(), hugging_face[name].float()) for name in open_clip)
    oracle = CLIPVisionModel.from_pretrained(GOLDENS / "clip", dtype=torch.float32).eval()
    encoder = ours(config, open_clip).float()
    torch.testing.assert_close(encoder(pixels(32)), oracle(pixels(32)).last_hidden_state[:, 1:], atol=1e-4, rtol=0)


def test_colours_come_from_the_preprocessor(tmp_path: Path) -> None:
    settings = json.loads((GOLDENS / "clip" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(colours))
    oracle = CLIPVisionModel(CLIPVisionConfig(**settings))
    save_file({f"vision_model.{name}": tensor for name, tensor in oracle.state_dict().items()}, tmp_path / WEIGHTS)
    config, _ = load_clip_folder(tmp_path)
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


PUBLISHED = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "resample": 3,
    "size": 224,
}


def test_the_published_image_settings_are_accepted() -> None:
    _check_preprocessor("", PUBLISHED, 224)
    _check_preprocessor("", CLIPImageProcessor().to_dict(), 224)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_normalize", False),
        ("do_rescale", False),
        ("rescale_factor", 1 / 127.5),
        ("resample", 0),
        ("do_center_crop", False),
        ("size", {"height": 224, "width": 224}),
        ("size", {"shortest_edge": 256}),
        ("crop_size", {"height": 192, "width": 192}),
    ],
)
def test_other_image_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{name} = .* is not implemented"):
        _check_preprocessor("", PUBLISHED | {name: value}, 224)


def test_published_configurations_are_read() -> None:
    vit_l = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    assert clip_config(vit_l.to_dict()) == OPENAI_VIT_L_14
    vit_h = {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
    published = open_clip_config({"model_cfg": {"vision_cfg": vit_h}})
    assert replace(published, resize="squash", keep_class_token=True, num_patches=257) == LAION_VIT_H_14


def test_fields_that_equal_the_defaults_may_be_absent() -> None:
    settings = {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model", "patch_size": 16}}
    assert clip_config(settings) == clip_config(CLIPVisionConfig(patch_size=16).to_dict())


def test_a_null_is_the_default_configuration() -> None:
    assert clip_config({"model_type": "clip", "vision_config": None}) == clip_config(CLIPVisionConfig().to_dict())
    with pytest.raises(CheckpointError, match=r"has no model_cfg.vision_cfg"):
        open_clip_config({"model_cfg": {"vision_cfg": None}, "preprocess_cfg": None})


VISION_CFG = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32}


@pytest.mark.parametrize(
    ("vision", "preprocess", "named"),
    [
        ({"timm_model_name": "convnext_base"}, {}, "timm_model_name = 'convnext_base'"),
        ({"layers": [3, 4, 6, 3]}, {}, "layers"),
        ({"head_width": 0}, {}, "head_width = 0"),
        ({"ls_init_value": 1e-4}, {}, "ls_init_value"),
        ({"no_ln_pre": True}, {}, "no_ln_pre"),
        ({"act_kwargs": {"approximate": "tanh"}}, {}, "act_kwargs"),
        ({}, {"resize_mode": "squash"}, "resize_mode = 'squash'"),
        ({}, {"interpolation": "bilinear"}, "interpolation"),
    ],
)
def test_unsupported_open_clip_settings_are_named(
    vision: dict[str, Any], preprocess: dict[str, Any], named: str
) -> None:
    plain = {"model_cfg": {"vision_cfg": VISION_CFG}, "preprocess_cfg": {}}
    assert open_clip_config(plain).activation == "gelu"
    with pytest.raises(CheckpointError) as caught:
        open_clip_config({"model_cfg": {"vision_cfg": VISION_CFG | vision}, "preprocess_cfg": preprocess})
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "siglip_vision_model"}, "'siglip_vision_model'"),
        ({"hidden_act": "mish"}, "'mish'"),
        ({"num_channels": 1}, "num_channels = 1"),
        ({"image_size": [224, 336]}, "image_size"),
        ({"patch_size": 0}, "patch_size = 0"),
        ({"vision_config": 3}, "a setting has a wrong type or value"),
        ({"hidden_act": ["gelu"]}, "activation ['gelu']"),
    ],
)
def test_unsupported_clip_settings_are_named(changes: dict[str, Any], named: str) -> None:
    settings = CLIPVisionConfig().to_dict()
    clip_config(settings)
    with pytest.raises(CheckpointError) as caught:
        clip_config(settings | changes)
    assert named in str(caught.value)


def test_misfits_are_listed_by_their_foreign_names() -> None:
    settings = CLIPVisionConfig(**SIZES, hidden_size=24).to_dict()
    tensors = {f"vision_model.{n}": t for n, t in CLIPVisionModel(CLIPVisionConfig(**settings)).state_dict().items()}
    del tensors["vision_model.pre_layrnorm.bias"]
    tensors["vision_model.embeddings.position_embedding.weight"] = torch.zeros(17, 24)
    with pytest.raises(CheckpointError) as caught:
        convert_clip(clip_config(settings), tensors, HUGGING_FACE)
    assert "missing (1): vision_model.pre_layrnorm.bias" in str(caught.value)
    assert "vision_model.embeddings.position_embedding.weight: found [17, 24], expected [5, 24]" in str(caught.value)


# the stride of each block (EfficientNet-Lite0: 1, 2, 2, 3, 3, 4, 1 blocks a stage); other sizes show in the weights
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


def lite0(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network as published, with the file's names: TensorFlow's padding, no squeeze-and-excitation, ReLU6."""

    def convolve(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        size, kernel = x.shape[-1], weight.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])

    def normalise(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (tensors[f"{name}.{t}"] for t in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = F.relu6(normalise("_bn0", convolve("_conv_stem", x, 2)))
    for i, stride in enumerate(STRIDES):
        block, h = f"_blocks.{i}.", x
        if f"{block}_expand_conv.weight" in tensors:
            h = F.relu6(normalise(f"{block}_bn0", convolve(f"{block}_expand_conv", h)))
        h = F.relu6(normalise(f"{block}_bn1", convolve(f"{block}_depthwise_conv", h, stride)))
        h = normalise(f"{block}_bn2", convolve(f"{block}_project_conv", h))
        x = x + h if x.shape == h.shape else h
    return F.relu6(normalise("_bn1", convolve("_conv_head", x)))


@torch.no_grad()
def test_efficientnet_lite0_from_its_package() -> None:
    tensors = read_pickle(expert_files().vision)
    encoder = ours(EFFICIENTNET_LITE0, convert_efficientnet_lite(EFFICIENTNET_LITE0, tensors))
    features, expected = encoder(pixels(224)), lite0(tensors, pixels(224))
    assert features.shape == (3, 49, 1280)
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=0)
