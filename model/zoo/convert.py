"""Convert the experts' files and the bridge to a model folder: `python -m model.zoo.convert VISION LANGUAGE_MODEL FOLDER`.

Weights are stored in float32, which represents the file's 4-bit numbers exactly and can be mapped into memory. One process
at a time converts; a second process waits and then uses the finished folder.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import Tensor

from model.cache import begin_import, is_ready, only_import
from model.checkpoint.gguf import GGUFFile
from model.checkpoint.vision_models import convert_efficientnet_lite
from model.folder import CheckpointError, save_folder
from model.kin import classifier_tensors
from model.likeness import LIKENESS
from model.prior import PRIOR
from model.zoo.bridge import load_bridge, start_bridge
from model.zoo.default import BRIDGE, DEFAULT, LANGUAGE_MODEL_FILE, LIKENESS_FILE, NEW_TOKENS, PRIOR_FILE, VISION_FILE
from model.zoo.fetch import ExpertFile
from model.zoo.progress import Progress

log = logging.getLogger("model.zoo.convert")  # the module runs as __main__


def convert(vision: Path, language_model: Path, folder: Path) -> None:
    """Convert the files to a model folder unless it is there, with its progress on stderr.

    Raises `CheckpointError` or `OSError`.
    """
    with only_import(folder):
        if not is_ready(folder):
            _convert(vision, language_model, folder)


def _convert(vision: Path, language_model: Path, folder: Path) -> None:
    progress = Progress("converting the default model", num_stages=4)
    progress.stage("checking the files")
    _check(vision, VISION_FILE)
    _check(language_model, LANGUAGE_MODEL_FILE)
    source = GGUFFile(language_model)
    if (config := source.config(len(NEW_TOKENS))) != DEFAULT.language_model:
        raise CheckpointError(f"{language_model} is {config}, the default model has {DEFAULT.language_model}")
    weights = torch.load(vision, weights_only=True)
    likeness = _likeness(weights)
    files = {LIKENESS: save(likeness), PRIOR: PRIOR_FILE.read_bytes()}
    tensors = _tensors(weights, likeness, source, progress)
    save_folder(folder, DEFAULT, tensors, source.tokenizer(NEW_TOKENS).to_str(), files=files)


def _likeness(vision: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    """Return the tensors that `training.default.likeness` built, with the classifier of the encoder's file."""
    classifier = {"weight": vision["_fc.weight"], "bias": vision["_fc.bias"]}
    return load_file(LIKENESS_FILE) | {name: t.half().contiguous().numpy() for name, t in classifier.items()}


def _tensors(
    vision: Mapping[str, Tensor], likeness: Mapping[str, NDArray[np.generic]], source: GGUFFile, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    progress.stage("reading the vision encoder")
    encoder = convert_efficientnet_lite(DEFAULT.vision, dict(vision))
    progress.stage("unpacking the language model")
    language_model = source.tensors(progress.track)
    experts = {f"vision.{name}": tensor for name, tensor in encoder.items()}
    experts |= {f"language_model.{name}": tensor for name, tensor in language_model.items()}
    experts |= classifier_tensors(likeness)
    yield from experts.items()
    yield from (load_bridge(BRIDGE) if BRIDGE.exists() else start_bridge(DEFAULT, experts)).items()
    progress.stage("writing the model folder")


def _check(path: Path, file: ExpertFile) -> None:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != file.sha256:
        raise CheckpointError(
            f"{path} has sha256 {digest}, but the file of {file.distribution} {file.version} has {file.sha256}"
        )


def main() -> None:
    begin_import()
    vision, language_model, folder = map(Path, sys.argv[1:])
    log.info("converting the default model into %s, once", folder)
    began = time.monotonic()
    try:
        convert(vision, language_model, folder)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    log.info("converted in %.0f s", time.monotonic() - began)


if __name__ == "__main__":
    main()
