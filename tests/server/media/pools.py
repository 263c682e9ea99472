"""A small vision encoder, media, and the processes of a pool, for the tests of decode pools."""

from __future__ import annotations

import sys
from pathlib import Path

from model.config import VisionConfig
from server.media.pool import DecodePool
from server.media.source import EncodedMedia, Kind, encoded

VISION = VisionConfig(
    architecture="tf_efficientnet_lite0",
    image_size=12,
    feature_dim=1,
    num_patches=1,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="crop",
)


def media(data: bytes, kind: Kind = "image") -> EncodedMedia:
    return encoded(data, kind, "prompt[0]")


def pids(pool: DecodePool) -> set[int]:
    return {process.pid for process in pool._processes if process.pid is not None}


def slowly_started(folder: Path) -> str:
    """Return the path of an interpreter that starts late."""
    slow = folder / "python"
    slow.write_text(f'#!/bin/sh\nsleep 1.5\nexec {sys.executable} "$@"\n')
    slow.chmod(0o700)
    return str(slow)
