"""Test that the encoder's stored classes are its own classifier's, which recognise a photograph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.folder import load_folder
from model.zoo.default import expert_files, prepare
from training.default_data.classes import extract_classes, read_classes
from training.default_data.features import encode

PHOTOGRAPHS = Path(__file__).parents[2] / "photographs"
CATS, CUPS = range(281, 286), (504, 967, 968)  # of ImageNet's classes


@pytest.mark.parametrize(("image", "classes"), [("cat.jpg", CATS), ("coffee.jpg", CUPS)])
def test_classes_recognise_a_photograph(tmp_path: Path, image: str, classes: range | tuple[int, ...]) -> None:
    extract_classes(tmp_path, expert_files().vision)
    with torch.inference_mode():
        features = encode(load_folder(prepare(), "cpu", torch.float32).vision, [PHOTOGRAPHS / image])  # [1, P, Dv]
    pooled = torch.from_numpy(features).float().mean(dim=(0, 1))
    assert int((read_classes(tmp_path) @ pooled).argmax()) in classes
