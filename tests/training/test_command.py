"""Tests of the command of a run: what cannot be trained, or was interrupted, gives one line and a status."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

from tests.training.toy import make_run
from training import __main__ as training
from training.config import TrainConfig
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
def test_an_interrupted_run_says_how_to_continue(
    command: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(file: Path) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "read_config", interrupt)
    monkeypatch.setattr("sys.argv", ["training", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as ended:
        command.main()  # type: ignore[attr-defined]
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted: the same command continues from the latest checkpoint\n"
