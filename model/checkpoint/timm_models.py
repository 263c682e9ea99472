"""Import convolutional vision encoders from a folder or repository of timm: a `config.json` and the whole network.

The tensors keep timm's own names; the classifier is left out. Of the image settings, the size, the mean and deviation of
colours, and crop or squash are used. timm's zoom before a crop (`crop_pct`) is ignored; images are scaled bicubically.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoint.files import Recipe, Source, convert, open_folder, refuse_fields, refuse_wrong_types
from model.checkpoint.vision_models import CONFIG, encoder_shapes
from model.config import Resize, VisionConfig
from model.folder import CheckpointError, read_json
from model.timm_encoders import feature_map, tensor_names

RESIZES: Mapping[str, Resize] = {"center": "crop", "squash": "squash", "border": "pad"}
# arguments of the network that do not change the encoder, or whose effect its sizes show
NEUTRAL_ARGUMENTS = {"num_classes", "global_pool", "in_chans", "img_size"}
DEFAULTS: Mapping[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_mode": "center",
}


@refuse_wrong_types(CONFIG)
def timm_config(config: Mapping[str, Any]) -> VisionConfig:
    """Read the `config.json` of timm; older files have the image settings next to the architecture."""
    if changes := {n: v for n, v in (config.get("model_args") or {}).items() if n not in NEUTRAL_ARGUMENTS}:
        raise CheckpointError(f"{CONFIG}model_args = {changes!r} is not implemented")
    settings = {**DEFAULTS, **(config.get("pretrained_cfg") or config)}
    refuse_fields(CONFIG, settings, {"crop_mode": tuple(RESIZES)})
    channels, height, width = settings["input_size"]
    if channels != 3 or height != width:
        raise CheckpointError(f"{CONFIG}input_size = {settings['input_size']!r}, must be a square of 3 channels")
    feature_dim, num_patches = feature_map(config["architecture"], height)
    return VisionConfig(
        architecture=config["architecture"],
        image_size=height,
        feature_dim=feature_dim,
        num_patches=num_patches,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        resize=RESIZES[settings["crop_mode"]],
    )


def load_timm_folder(folder: Path) -> tuple[VisionConfig, dict[str, Tensor]]:
    """Read a network of timm; the tensors' names are relative to `vision.`."""
    config = timm_config(read_json(folder / "config.json"))
    return config, convert_timm(config, open_folder(folder))


def convert_timm(config: VisionConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a network, or its encoder alone, to names relative to `vision.`."""
    shapes = encoder_shapes(config)
    unused = tensor_names(config.architecture) - shapes.keys()
    recipes = {f"encoder.{name}": Recipe((Source(name, shape),), shape) for name, shape in shapes.items()}
    encoder = {name: tensors[name] for name in tensors if name not in unused}
    return convert("the vision model's checkpoint", recipes, encoder)
