"""Test that two processes with FSDP2 over gloo have the losses of one process and exchange checkpoints with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from model.folder import load_folder
from tests.training.toy import losses, make_run, make_trainer
from training.bridge import trained_parameters
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import json, sys
from pathlib import Path
from tests.training.toy import losses, make_trainer
from training.checkpoint import export
from training.config import parse_config
from training.distributed import join, leave
world = join()
config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
trainer = make_trainer(config, world)
trainer.resume()
step_losses = losses(trainer)
trainer.save()
trainer.check_frozen()
export(trainer.model, Path(config.model) / "tokenizer.json", Path(config.out) / "model", world, config.export_name)
if world.is_first:
    Path(sys.argv[2]).write_text(json.dumps(step_losses))
leave(world)
"""


def torchrun(*arguments: str | Path, timeout: float = 300) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *map(str, arguments),
    ]
    finished = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=timeout
    )
    assert finished.returncode == 0, finished.stderr[-4000:]


def losses_of_two(folder: Path, config: TrainConfig) -> list[dict[str, float]]:
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "worker.py").write_text(WORKER)
    torchrun(folder / "worker.py", folder / "config.json", folder / "losses.json")
    step_losses: list[dict[str, float]] = json.loads((folder / "losses.json").read_text())
    return step_losses


@pytest.mark.parametrize(
    ("precision", "trains"),
    [("float32", ("bridge",)), ("bfloat16", ("bridge",)), ("float32", ("bridge", "vision", "language_model"))],
    ids=["float32", "bfloat16", "everything"],
)
def test_two_processes_have_the_losses_of_one_and_their_checkpoint_resumes_on_one(
    tmp_path: Path, precision: str, trains: tuple[str, ...]
) -> None:
    config = make_run(tmp_path, steps=4, precision=precision, trains=trains)
    one_process = losses(make_trainer(replace(config, steps=6)))
    two_processes = losses_of_two(tmp_path, config)
    tolerance = 2e-5 if precision == "float32" else 2e-2
    for expected_losses, step_losses in zip(one_process[:4], two_processes, strict=True):
        assert step_losses == pytest.approx(expected_losses, rel=tolerance)
    resumed = make_trainer(replace(config, steps=6))
    assert resumed.resume() == 4
    for expected_losses, step_losses in zip(one_process[4:], losses(resumed), strict=True):
        assert step_losses == pytest.approx(expected_losses, rel=10 * tolerance)
    served = load_folder(tmp_path / "out" / "model", "cpu", torch.float32)
    trained = make_trainer(config)
    trained.resume()
    original = load_folder(tmp_path / "model", "cpu", torch.float32).state_dict()
    expected = {name: parameter.detach() for name, parameter in trained_parameters(trained.model)}
    assert all(torch.equal(tensor, expected.get(name, original[name])) for name, tensor in served.state_dict().items())


def test_the_command_runs_in_two_processes_and_logs_every_step(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=2)
    (tmp_path / "run.yaml").write_text(json.dumps(asdict(config)))
    torchrun("-m", "training", tmp_path / "run.yaml", timeout=120)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert load_folder(tmp_path / "out" / "model", "cpu", torch.float32).config.name == "out"
