"""A fingerprint follows what a model computes with, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.fingerprint import fingerprint

VISION = np.arange(4096, dtype=np.float32).reshape(64, 64)
HEAD = np.ones(3, np.float32)


def folder(path: Path, *, vision: np.ndarray = VISION, head: np.ndarray = HEAD, config: str = "{}") -> Path:
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "tokenizer.json").write_text("{}")
    save_file({"vision": vision, "head": head}, path / "model.safetensors")
    return path


def test_a_copy_has_the_same(tmp_path: Path) -> None:
    first = folder(tmp_path / "first")
    shutil.copytree(first, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("notes are no weights")
    assert fingerprint(first) == fingerprint(tmp_path / "copy")
    assert len(fingerprint(first)) == 32


@pytest.mark.parametrize(
    "other",
    [
        {"vision": VISION + 1},
        {"head": HEAD * 2},
        {"vision": VISION.reshape(4096)},
        {"vision": VISION.astype(np.float16)},
        {"config": '{"dim": 2}'},
    ],
    ids=["a large tensor", "a small tensor", "a shape", "a type", "the config"],
)
def test_what_changes_the_features_changes_it(tmp_path: Path, other: dict[str, np.ndarray]) -> None:
    assert fingerprint(folder(tmp_path / "first")) != fingerprint(folder(tmp_path / "other", **other))  # type: ignore[arg-type]
