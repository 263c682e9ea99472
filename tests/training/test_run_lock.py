"""Tests that a second run into the folder of a running one is refused, and that a folder is free after a run."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from model.config import ConfigError
from tests.training.contrastive import shapes
from tests.training.toy import make_run, make_trainer
from training.contrastive.__main__ import train
from training.contrastive.trainer import ContrastiveTrainer
from training.distributed import World
from training.run_lock import LOCK, only_run
from training.trainer import run


def test_a_second_run_into_the_folder_of_a_running_one_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(make_run(tmp_path, steps=1))
    shapes_folder = tmp_path / "shapes"
    shapes_folder.mkdir()
    contrastive = ContrastiveTrainer(shapes.make_run(shapes_folder, steps=1, batch_size=6), World().device)
    for out in (trainer.out, contrastive.out):
        out.mkdir()
        with (out / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(ConfigError, match=r"^another run writes to .*: wait for its end, or change out$"):
                run(trainer, tmp_path / "model" / "tokenizer.json") if out == trainer.out else train(contrastive)
        assert [path.name for path in out.iterdir()] == [LOCK]


def test_a_folder_is_free_after_a_run_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), only_run(tmp_path):
        raise ValueError("x")
    with only_run(tmp_path), only_run(tmp_path, enabled=False):
        pass
