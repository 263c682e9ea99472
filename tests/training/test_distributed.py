"""Two processes over gloo, weights sharded by FSDP2: the losses of one process, and a checkpoint that either reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from model.checkpoint.native import load_folder
from tests.training.toy import losses, make_run, make_trainer
from training.bridge import bridge_parameters
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
seen = losses(trainer)
trainer.save()
trainer.check_frozen()
export(trainer.model, Path(config.model) / "tokenizer.json", Path(config.out) / "model", world)
if world.is_first:
    Path(sys.argv[2]).write_text(json.dumps(seen))
leave(world)
"""


def torchrun(folder: Path, config: TrainConfig) -> list[dict[str, float]]:
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "worker.py").write_text(WORKER)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(folder / "worker.py"), str(folder / "config.json"), str(folder / "losses.json")),
    ]
    finished = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    seen: list[dict[str, float]] = json.loads((folder / "losses.json").read_text())
    return seen


@pytest.mark.parametrize(
    ("precision", "trains"),
    [("float32", ("bridge",)), ("bfloat16", ("bridge",)), ("float32", ("bridge", "vision", "language_model"))],
    ids=["float32", "bfloat16", "everything"],
)
def test_two_processes_have_the_losses_of_one_and_their_checkpoints_are_each_other_s(
    tmp_path: Path, precision: str, trains: tuple[str, ...]
) -> None:
    config = make_run(tmp_path, steps=4, precision=precision, trains=trains)
    alone = losses(make_trainer(replace(config, steps=6)))
    together = torchrun(tmp_path, config)
    tolerance = 2e-5 if precision == "float32" else 2e-2
    for one, two in zip(alone[:4], together, strict=True):
        assert two == pytest.approx(one, rel=tolerance)
    resumed = make_trainer(replace(config, steps=6))
    assert resumed.resume() == 4
    for one, two in zip(alone[4:], losses(resumed), strict=True):
        assert two == pytest.approx(one, rel=10 * tolerance)
    served = load_folder(tmp_path / "out" / "model", "cpu", torch.float32)
    trained = make_trainer(config)
    trained.resume()
    found, came = served.state_dict(), load_folder(tmp_path / "model", "cpu", torch.float32).state_dict()
    expected = {name: parameter.detach() for name, parameter in bridge_parameters(trained.model)}
    assert all(torch.equal(tensor, expected.get(name, came[name])) for name, tensor in found.items())
