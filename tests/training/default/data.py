"""A data folder like that of `training.default_data`, with random features and enough labels for every kind of sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.tiny_models import VISION
from training.default_data.classes import save_classes
from training.default_data.features import feature_file
from training.default_data.records import Record, write_records

KINDS = ("animal", "fruit", "tool", "vehicle", "plant", "cloth")


def make_folder(folder: Path, per_label: int = 8) -> Path:
    records = [
        Record(
            image=f"images/{source}/{kind}-{number}.webp",
            label=f"{kind} {number}",
            category=kind,
            tags=("round",),
            source=source,
            licence="MIT",
            style="a drawing",
            domain="drawing",
            trains=True,
        )
        for kind in KINDS
        for number in range(16)
        for source in map(str, range(per_label))
    ]
    photographs = [
        Record(
            image=f"images/photo/{kind}-{number}.webp",
            label="",
            category=f"photo {kind}",
            tags=(),
            source="photo",
            licence="GPL-2",
            style="a photograph",
            domain="photograph",
            trains=False,
        )
        for kind in KINDS
        for number in range(9)
    ]
    write_records(folder, [replace(each, digest=each.image) for each in (*records, *photographs)])
    shape = (len(records) + len(photographs), VISION.num_patches, VISION.feature_dim)
    np.save(
        feature_file(folder, [*records, *photographs]), np.random.default_rng(0).normal(size=shape).astype(np.float16)
    )
    save_classes(folder, torch.randn(20, VISION.feature_dim, generator=torch.Generator().manual_seed(0)))
    return folder
