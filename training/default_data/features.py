"""Caches the frozen encoder's features of every image as float16 in one file, which training and evaluation memory-map.

Row n belongs to record n. An interrupted run continues after the rows that it has written.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model.config import VisionConfig
from model.folder import load_folder
from model.media import resize
from model.vision import VisionEncoder, normalise
from training.default_data.records import Record

log = logging.getLogger(__name__)
BATCH = 16


def feature_file(folder: Path, records: Sequence[Record]) -> Path:
    """Return the cache's path, whose name is a hash of the image names in order, so that rows always match records."""
    digest = hashlib.sha256("\n".join(record.image for record in records).encode()).hexdigest()[:12]
    return folder / f"features-{digest}.npy"


def open_features(folder: Path, records: Sequence[Record]) -> NDArray[np.float16]:
    """Return the rows [N, P, Dv], memory-mapped. Raises `FileNotFoundError` if they were not cached, or of other images."""
    if not (file := feature_file(folder, records)).exists():
        raise FileNotFoundError(f"{file} does not exist: compute it with python -m training.default_data")
    features: NDArray[np.float16] = np.load(file, mmap_mode="r")
    return features


@torch.inference_mode()
def cache_features(folder: Path, records: Sequence[Record], model_folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    file = feature_file(folder, records)
    if file.exists():
        return
    encoder = load_folder(model_folder, "cpu", torch.float32).vision
    config = encoder.config
    partial, progress = file.with_suffix(".partial.npy"), file.with_suffix(".rows")
    # the file is empty if the run was killed between creating and writing it
    done = int(progress.read_text() or 0) if progress.exists() else 0
    shape = (len(records), config.num_patches, config.feature_dim)
    rows = np.lib.format.open_memmap(partial, "r+" if done else "w+", np.float16, shape)
    started = time.monotonic()
    for first in range(done, len(records), BATCH):
        batch = records[first : first + BATCH]
        rows[first : first + len(batch)] = encode(encoder, [folder / record.image for record in batch])
        progress.write_text(str(first + len(batch)))
        if first // BATCH % 40 == 0:
            rate = (first - done + BATCH) / (time.monotonic() - started)
            log.info("features: %d of %d, %.0f images per second", first, len(records), rate)
    rows.flush()
    partial.rename(file)
    progress.unlink(missing_ok=True)


def encode(encoder: VisionEncoder, files: Sequence[Path]) -> NDArray[np.float16]:
    squares = np.stack([_square(file, encoder.config) for file in files])
    features: NDArray[np.float16] = (
        encoder.plain_features(normalise(torch.from_numpy(squares), encoder.config)).half().numpy()
    )
    return features


def _square(file: Path, config: VisionConfig) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        return resize(image, config)
