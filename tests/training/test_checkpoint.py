"""Tests of damaged checkpoints: the error is one line, which names the older checkpoint that is continued without them."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from model.folder import CheckpointError
from tests.training.toy import losses, make_run, make_trainer
from training.checkpoint import POSITIONS, latest, list_checkpoints, save
from training.config import TrainConfig
from training.distributed import World
from training.trainer import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig]:
    folder = tmp_path_factory.mktemp("run")
    config = make_run(folder, steps=2)
    trainer = make_trainer(config)
    trainer.save()
    losses(trainer)
    trainer.save()
    return folder / "out", config


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: int(share * len(content))])

    return damage


def edit(**values: object) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        positions = json.loads((checkpoint / POSITIONS).read_text())
        (checkpoint / POSITIONS).write_text(json.dumps({**positions, **values}))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        *(truncate(name, share) for name in (POSITIONS, ".metadata", "__0_0.distcp") for share in (0.0, 0.5)),
        *(lambda path, name=name: (path / name).unlink() for name in (POSITIONS, ".metadata", "__0_0.distcp")),
        *(edit(streams={}), edit(streams=1), edit(streams={"pairs/0": 1}), edit(step="x")),
        lambda path: (path / POSITIONS).write_text("[]"),
        lambda path: [file.unlink() for file in path.iterdir()],
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_older_one(
    finished: tuple[Path, TrainConfig], damage: Callable[[Path], None]
) -> None:
    out, config = finished
    changed = out.rename(out.parent / "kept")
    try:
        shutil.copytree(changed, out)
        damage(out / "checkpoints" / "step-00000002")
        with pytest.raises(
            CheckpointError, match=r"^\S+step-00000002 is damaged: .+; remove it to continue from step-00000000$"
        ):
            make_trainer(config).resume()
    finally:
        shutil.rmtree(out)
        changed.rename(out)


def test_without_an_older_checkpoint_the_run_starts_again(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    (make_trainer(config).save() / POSITIONS).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000000 is damaged: .+; remove it to start again$"):
        make_trainer(config)


def test_a_copy_of_a_checkpoint_is_neither_resumed_nor_deleted(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000002-backup", "step-2.old", "step-00000004", "step-100000000"):
        (tmp_path / name).mkdir()
    save(tmp_path, 6, {"a": torch.zeros(1)}, {}, {}, World())
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006", "step-100000000"]
    assert latest(tmp_path) == tmp_path / "step-100000000"
    assert {"step-00000002-backup", "step-2.old"} <= {path.name for path in tmp_path.iterdir()}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **kwargs: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # torch closes the file, which fails again

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.torch.save", fill)
    with pytest.raises(CheckpointError, match=r"^\S+/\.step-00000006 cannot be written: .*No space left on device$"):
        save(tmp_path, 6, {"a": torch.zeros(1)}, {}, {}, World())
    assert not list(tmp_path.iterdir())


def test_an_interrupted_checkpoint_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.torch.save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 6, {"a": torch.zeros(1)}, {}, {}, World())
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_export_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    trainer = make_trainer(make_run(tmp_path, steps=1))
    monkeypatch.setattr("model.folder.save_file", fill)
    with pytest.raises(CheckpointError, match=r"^\S+/shard-0 cannot be written: .*No space left on device"):
        run(trainer, tmp_path / "model" / "tokenizer.json")


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1)
    partial = (tmp_path / "out" / "checkpoints" / ".step-00000003", tmp_path / "out" / ".model-x1y2_z34")
    for folder in partial:
        folder.mkdir(parents=True)
        (folder / "large").write_bytes(b"x")
    run(make_trainer(config), Path(config.model) / "tokenizer.json")
    assert not [folder for folder in partial if folder.exists()]
    assert (tmp_path / "out" / "model" / "config.json").exists()
