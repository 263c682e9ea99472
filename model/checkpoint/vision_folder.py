"""The folder of a vision encoder alone: `config.json` is its `VisionConfig`, `model.safetensors` its weights.

Contrastive pretraining writes one, and bridge training can use it in place of the model's encoder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint.tensor_files import CheckpointError, check_shapes, shapes_of
from model.config import VisionConfig, from_dict
from model.vision import VisionEncoder

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_vision_folder(folder: Path, config: VisionConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a folder, which is moved to its path when complete; an existing one is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    (partial / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / WEIGHTS)
    partial.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load_vision_folder(folder: Path) -> VisionEncoder:
    """Load an encoder to the CPU, for evaluation. Raises `CheckpointError`."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is not a vision folder: it lacks {CONFIG} or {WEIGHTS}")
    config = from_dict(VisionConfig, json.loads((folder / CONFIG).read_text(encoding="utf-8")), f"{folder}/{CONFIG}")
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    stored = load_file(folder / WEIGHTS)
    check_shapes(str(folder), shapes_of(encoder.state_dict()), shapes_of(stored))
    encoder.load_state_dict(stored, assign=True)
    return encoder
