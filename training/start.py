"""Functions that change the model with which a run begins: its resolution, bridge, encoder or language model.

Each returns a new model with a changed configuration, which the export contains, too.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from math import isqrt
from pathlib import Path

import torch
from safetensors.numpy import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from model.config import ConfigError, FlamingoConfig, KinConfig, VisionConfig
from model.flamingo import Flamingo
from model.kin import ANCESTORS, PREFIX, classifier_tensors
from model.language_model import LanguageModel
from model.likeness import LIKENESS
from model.timm_encoders import feature_map
from model.vision import VisionEncoder
from model.zoo.bridge import SEED, start_bridge
from training.bridge import is_bridge
from training.config import AblateConfig
from training.default.discriminants import Discriminants, fit_discriminants

log = logging.getLogger(__name__)
FRAMES = "resampler.frame_embeddings"
PROJECTION, BIAS = "resampler.input.weight", "resampler.input.bias"


def rebuild(config: FlamingoConfig, tensors: dict[str, Tensor]) -> Flamingo:
    """Return a model with exactly these tensors."""
    with torch.device("meta"):
        model = Flamingo(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def with_free_weights(model: Flamingo) -> Flamingo:
    """Return the model with weights declared as float, because training changes quantised values of a language model."""
    language_model = replace(model.config.language_model, weights="float")
    return rebuild(replace(model.config, language_model=language_model), model.state_dict())


def with_new_language_model(model: Flamingo, seed: int) -> Flamingo:
    """Return the model with random weights in the language model; new tokens' rows keep the bridge's weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scratch = LanguageModel(model.config.language_model).state_dict()
    fresh = {f"language_model.{name}": tensor for name, tensor in scratch.items()}
    kept = {name: tensor for name, tensor in model.state_dict().items() if is_bridge(name) or name not in fresh}
    return rebuild(model.config, {**fresh, **kept})


def with_vision(model: Flamingo, encoder: VisionEncoder) -> Flamingo:
    """Return the model with another encoder and an untrained bridge that reads the encoder's features."""
    config, patches = model.config, encoder.config.num_patches
    resampler = replace(
        config.resampler,
        input_projection=config.resampler.input_projection or config.resampler.dim != encoder.config.width,
        num_spatial=patches if config.resampler.num_spatial else 0,
    )
    config = replace(config, vision=encoder.config, resampler=resampler)
    language_model = {n: t for n, t in model.state_dict().items() if n.startswith("language_model.")}
    vision = {f"vision.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return rebuild(config, {**language_model, **vision, **start_bridge(config, language_model)})


def with_kin(model: Flamingo, folder: Path, dim: int) -> Flamingo:
    """Return the model whose untrained bridge also reads `dim` coordinates of kin, from the likeness in the model's folder.

    Without coordinates, it reads the features alone. Raises ConfigError if the folder has no likeness with classes.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not is_bridge(name)}
    experts, kin = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}, KinConfig()
    if dim:
        experts |= _kin_of_folder(folder)
        num_ancestors, num_classes = experts[ANCESTORS].shape
        kin = KinConfig(dim=dim, num_classes=num_classes, num_ancestors=num_ancestors)
    config = replace(model.config, vision=replace(model.config.vision, kin=kin))
    return rebuild(config, {**experts, **start_bridge(config, experts)})


def _kin_of_folder(folder: Path) -> dict[str, Tensor]:
    if not (folder / LIKENESS).is_file():
        raise ConfigError(f"kin needs the classes in {LIKENESS}, which {folder} does not have")
    return classifier_tensors(load_file(folder / LIKENESS))


def with_added_kin(model: Flamingo, folder: Path, dim: int, data: Path) -> Flamingo:
    """Return the model whose trained bridge also reads `dim` coordinates of kin, along the discriminants of `data`.

    The projection of kin is orthogonal to that of the features' discriminants, so that at first kin disturbs little. Raises
    ConfigError as `with_kin` and `with_discriminants` do, and for a model that has kin.
    """
    if model.config.vision.kin.dim:
        raise ConfigError(f"kin: the bridge of {folder} already reads {model.config.vision.kin.dim} coordinates of kin")
    fresh = with_kin(model, folder, dim)
    discriminants = _fit(fresh, data)
    added = discriminants.projection(model.config.resampler.dim)[:, -dim:]
    tensors = {**fresh.state_dict(), **{n: t for n, t in model.state_dict().items() if is_bridge(n)}}
    tensors[PROJECTION] = torch.cat([tensors[PROJECTION], added], dim=1)
    tensors[BIAS] = tensors[BIAS] - added @ discriminants.mean[-dim:]
    return rebuild(fresh.config, tensors)


def with_ablated_bridge(model: Flamingo, ablate: AblateConfig, seed: int = SEED) -> Flamingo:
    """Return the model with an untrained bridge of another configuration between the same experts."""
    config = model.config
    gated = replace(
        config.gated,
        gate=ablate.gate or config.gated.gate,
        attends=ablate.attends or config.gated.attends,
        interval=ablate.interval or config.gated.interval,
    )
    resampler = replace(config.resampler, kind=ablate.resampler or config.resampler.kind)
    config = replace(config, gated=gated, resampler=resampler)
    experts = {name: tensor for name, tensor in model.state_dict().items() if not is_bridge(name)}
    return rebuild(config, {**experts, **start_bridge(config, experts, seed)})


def with_discriminants(model: Flamingo, data: Path) -> Flamingo:
    """Return the model whose untrained resampler projects features to the discriminants of the images in `data`.

    Raises ConfigError if the resampler has no input projection or the features have another width.
    """
    discriminants = _fit(model, data)
    tensors = model.state_dict()
    projection = discriminants.projection(model.config.resampler.dim)
    tensors[PROJECTION] = projection
    # the bias that `start_as_mean` set is kept
    tensors[BIAS] = tensors[BIAS] - projection @ discriminants.mean
    return rebuild(model.config, tensors)


def _fit(model: Flamingo, data: Path) -> Discriminants:
    resampler, feature_dim = model.config.resampler, model.config.vision.width
    if resampler.kind != "perceiver" or not resampler.input_projection:
        raise ConfigError(f"discriminants need a Perceiver with an input projection, the resampler is {resampler.kind}")
    discriminants = fit_discriminants(data, resampler.dim, model.vision.kin)
    if (width := discriminants.directions.shape[1]) != feature_dim:
        raise ConfigError(f"discriminants: {data} holds features of width {width}, the encoder's have {feature_dim}")
    return discriminants


def with_scaled_frames(model: Flamingo, scale: float) -> Flamingo:
    """Return the model with its resampler's embeddings of frames multiplied by `scale`.

    Raises ConfigError if the resampler has none.
    """
    tensors = model.state_dict()
    if FRAMES not in tensors:
        raise ConfigError("frame_scale needs a resampler with embeddings of frames, resampler.num_frames is 0")
    return rebuild(model.config, {**tensors, FRAMES: scale * tensors[FRAMES]})


def at_resolution(model: Flamingo, image_size: int) -> Flamingo:
    """Return the model for square images of `image_size`: the encoder's and the resampler's positions are interpolated.

    Raises ConfigError if the encoder's patches do not form a square or the images are smaller than one.
    """
    before = model.config.vision
    _check_patches(before, image_size)
    after = replace(before, image_size=image_size, num_patches=_num_patches(model, image_size))
    if (old := grid_side(before)) is None or (new := grid_side(after)) is None:
        raise ConfigError(
            f"image_size {image_size}: {before.num_patches} patches do not form a square and cannot be interpolated"
        )
    tensors = model.state_dict()
    for name, num_first in _position_tables(model):
        tensors[name] = interpolate_positions(tensors[name], old, new, num_first)
    resampler = model.config.resampler
    if resampler.num_spatial:
        resampler = replace(resampler, num_spatial=after.num_patches)
    return rebuild(replace(model.config, vision=after, resampler=resampler), tensors)


def _check_patches(config: VisionConfig, image_size: int) -> None:
    """Raise ConfigError for images without a patch, and warn about pixels that are in none."""
    side = config.patch_size
    if config.architecture != "clip_vit" or image_size % side == 0:
        return
    if image_size < side:
        raise ConfigError(f"image_size is {image_size}, must be at least {side}, the side of the encoder's patches")
    log.warning(
        "warning: image_size %d is no multiple of %d, the side of the encoder's patches: the encoder does not see the "
        "last %d rows and columns of an image",
        image_size,
        side,
        image_size % side,
    )


def _num_patches(model: Flamingo, image_size: int) -> int:
    config = model.config.vision
    if config.architecture == "clip_vit":
        return (image_size // config.patch_size) ** 2 + config.keep_class_token
    return feature_map(config.architecture, image_size)[1]


def grid_side(config: VisionConfig) -> int | None:
    """Return the side of the square that the patches form, or None if they do not."""
    patches = config.num_patches - config.keep_class_token
    side = isqrt(patches)
    return side if side * side == patches else None


def _position_tables(model: Flamingo) -> list[tuple[str, int]]:
    """Return the tables with one row per patch, each with the number of leading rows that belong to no patch."""
    config = model.config
    tables = []
    if config.vision.architecture == "clip_vit":
        tables.append(("vision.encoder.pos_embed", 1))
    if config.resampler.num_spatial:
        tables.append(("resampler.spatial_embeddings", int(config.vision.keep_class_token)))
    return tables


def interpolate_positions(table: Tensor, old: int, new: int, num_first: int) -> Tensor:
    """Interpolate a table [.., first + old * old, D] to new * new patches (bicubic); its first rows are kept."""
    rows = table if table.dim() == 3 else table[None]
    out = resample_abs_pos_embed(rows, [new, new], [old, old], num_prefix_tokens=num_first)
    return out if table.dim() == 3 else out[0]
