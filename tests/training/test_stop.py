"""Tests that a run of real processes ends after its current step with a checkpoint when a signal arrives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.training.contrastive.shapes import make_run as make_contrastive_run
from tests.training.toy import losses, make_run, make_trainer
from training.ablations import __main__ as ablations
from training.checkpoint import list_checkpoints
from training.config import TrainConfig
from training.distributed import World
from training.few_shot import __main__ as few_shot
from training.progress import ProgressReporter
from training.step import StepReport
from training.stop import Stopped, StopSignal, stop_signal
from training.trainer import _wait_while_paused, run

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
MANY = 100_000


def start(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments), str(folder / "run.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def endless(folder: Path) -> TrainConfig:
    config = replace(make_run(folder, steps=MANY), checkpoint_steps=MANY)
    (folder / "run.yaml").write_text(json.dumps(asdict(config)))
    return config


@pytest.mark.parametrize("processes", [(), TORCHRUN], ids=["one", "two"])
def test_a_terminated_run_saves_a_checkpoint_and_continues_with_the_same_losses(
    processes: tuple[str, ...], tmp_path: Path
) -> None:
    config = endless(tmp_path)
    process = start(tmp_path, *processes, "-m", "training")
    log = tmp_path / "out" / "log.jsonl"
    wait_until(log.exists, process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (checkpoint,) = list_checkpoints(tmp_path / "out" / "checkpoints")
    assert checkpoint.name == f"step-{len(lines):08}"
    assert f"interrupted: the same command continues from {checkpoint}" in errors
    if not processes:
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in errors
    expected = losses(make_trainer(replace(config, out=str(tmp_path / "other"), steps=len(lines) + 2)))
    resumed = make_trainer(replace(config, steps=len(lines) + 2))
    assert resumed.resume() == len(lines)
    for after, step_losses in zip(expected[len(lines) :], losses(resumed), strict=True):
        assert step_losses == pytest.approx(after, rel=2e-4)


def test_an_interrupted_contrastive_run_saves_a_checkpoint(tmp_path: Path) -> None:
    config = replace(make_contrastive_run(tmp_path, steps=MANY), checkpoint_steps=MANY)
    (tmp_path / "run.yaml").write_text(json.dumps(asdict(config)))
    process = start(tmp_path, "-m", "training.contrastive")
    wait_until((tmp_path / "out" / "log.jsonl").exists, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    (checkpoint,) = list_checkpoints(tmp_path / "out" / "checkpoints", ".pt")
    assert process.returncode == 128 + signal.SIGINT
    assert errors.endswith(f"interrupted: the same command continues from {checkpoint}\n")


@pytest.mark.parametrize("is_due", [False, True])
def test_a_checkpoint_is_saved_once(is_due: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(replace(make_run(tmp_path), checkpoint_steps=1 if is_due else MANY))
    saved: list[int] = []
    monkeypatch.setattr(trainer, "save", lambda: saved.append(trainer.num_steps_done))

    def terminate(report: StepReport) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        run(trainer, tmp_path / "model" / "tokenizer.json", observe=terminate)
    assert (stopped.value.number, saved) == (signal.SIGTERM, [1])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert not (tmp_path / "out" / "model").exists()


def test_a_second_interrupt_ends_the_run_at_once_and_a_second_sigterm_does_not() -> None:
    stop = StopSignal()
    stop.receive(signal.SIGTERM)
    stop.receive(signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT)


def test_a_paused_run_ends_after_a_signal(tmp_path: Path) -> None:
    (tmp_path / "pause").touch()
    stop = StopSignal()
    stop.receive(signal.SIGINT)
    _wait_while_paused(tmp_path / "pause", World(), stop)


def test_a_run_in_another_thread_changes_no_handler() -> None:
    def enter() -> None:
        with stop_signal():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[object] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("program", [ablations, few_shot], ids=["ablations", "few_shot"])
@pytest.mark.parametrize(("interrupt", "status"), [(Stopped(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)])
def test_a_program_of_many_runs_says_that_it_continues(
    program: ModuleType,
    interrupt: KeyboardInterrupt,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_missing(options: object) -> None:
        raise interrupt

    monkeypatch.setattr(program, "run_missing", run_missing)
    monkeypatch.setattr(sys, "argv", ["program", "--threads", str(torch.get_num_threads())])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == status
    assert capsys.readouterr().err == "interrupted: the same command continues\n"


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_after_the_last_step_ends_the_run_before_its_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(progress: ProgressReporter, *error: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ProgressReporter, "__exit__", end)
    trainer = make_trainer(make_run(tmp_path))
    with pytest.raises(Stopped):
        run(trainer, tmp_path / "model" / "tokenizer.json")
    assert not (tmp_path / "out" / "model").exists()
