"""Tests of the command of a run: what cannot be trained, or was interrupted, gives one line and a status."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import yaml

from tests.training.toy import make_run
from training import __main__ as training
from training.config import TrainConfig, read_mapping
from training.contrastive import __main__ as contrastive


def start(config: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the lists of YAML are tuples of a configuration
    values = {**asdict(config), "trains": list(config.trains), "sets": list(map(asdict, config.sets))}
    values["optim"]["betas"] = list(config.optim.betas)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr("sys.argv", ["training", str(folder / "run.yaml")])
    training.main()


def test_fewer_steps_than_the_run_has_done_export_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path, steps=2)
    start(config, tmp_path, monkeypatch)
    before = (tmp_path / "out" / "model" / "model.safetensors").stat()
    with pytest.raises(SystemExit, match=r"^error: steps is 1, but \S+/step-00000002 has more: raise steps"):
        start(replace(config, steps=1), tmp_path, monkeypatch)
    assert (tmp_path / "out" / "model" / "model.safetensors").stat() == before


def test_clips_for_another_encoder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path)
    clips = replace(config.sets[0], kind="named_clips")
    with pytest.raises(SystemExit, match=r"^error: set pairs: kind named_clips has images of 32 pixels, but .* 8$"):
        start(replace(config, sets=(clips,)), tmp_path, monkeypatch)


@pytest.mark.parametrize("command", [training, contrastive], ids=["training", "contrastive"])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_an_interrupted_run_says_how_to_continue(
    command: Any,
    has_checkpoint: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*arguments: object) -> NoReturn:
        raise KeyboardInterrupt

    suffix = ".pt" if command is contrastive else ""
    checkpoint = tmp_path / "checkpoints" / f"step-00000002{suffix}"
    if has_checkpoint:
        checkpoint.mkdir(parents=True)
    monkeypatch.setattr(command, "read_config", lambda file: SimpleNamespace(out=str(tmp_path)))
    monkeypatch.setattr(command, "train", interrupt)
    monkeypatch.setattr(contrastive, "ContrastiveTrainer", lambda *arguments: None)
    monkeypatch.setattr("sys.argv", ["training", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 130
    start = f"interrupted: the same command continues from {checkpoint}"
    again = "interrupted before the first checkpoint: the same command starts again"
    assert capsys.readouterr().err == f"{start if has_checkpoint else again}\n"


def test_a_number_may_have_the_form_of_json(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, value in (
        ("1e-3", 0.001),
        ("1.5E3", 1500.0),
        ("-2e+1", -20.0),
        ("1.0e-3", 0.001),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1e3-birds", "1e3-birds"),
        ("12e3:4", "12e3:4"),
    ):
        file.write_text(f"a: {text}")
        assert read_mapping(file) == {"a": value}
