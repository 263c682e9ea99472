"""Tests of `precision: auto`: what a device computes fast, and what a resumed run keeps on another device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import ConfigError
from tests.training.contrastive import shapes
from tests.training.toy import losses, make_run, make_trainer
from training import precision
from training.contrastive.trainer import ContrastiveTrainer
from training.distributed import World
from training.precision import describe_precision, with_precision

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
Has = Callable[[bool], None]


@pytest.fixture
def cpu_has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Has:
    return lambda has: monkeypatch.setattr(precision, "has_bfloat16", lambda: has)


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_the_format_that_the_cpu_computes_fast(
    tmp_path: Path, cpu_has_bfloat16: Has, has: bool, expected: str
) -> None:
    cpu_has_bfloat16(has)
    trainer = make_trainer(make_run(tmp_path, precision="auto"))
    assert trainer.config.precision == trainer.settings["precision"] == expected
    assert trainer.model.language_model.norm.weight.dtype == getattr(torch, expected)


@pytest.mark.parametrize(("is_native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_native: bool, expected: str
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or is_native
    )
    config = make_run(tmp_path, precision="auto")
    assert with_precision(config, World(device=CUDA), None).precision == expected


def test_all_processes_compute_in_the_format_that_each_of_them_computes_fast(
    tmp_path: Path, cpu_has_bfloat16: Has, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_has_bfloat16(True)
    monkeypatch.setattr(World, "max", lambda self, value: max(value, 1))  # another process has no bfloat16
    config = make_run(tmp_path, precision="auto")
    assert with_precision(config, World(rank=0, size=2, device=CPU), None).precision == "float32"


@pytest.mark.parametrize("has", [True, False])
def test_a_resumed_run_keeps_its_precision_on_another_device(tmp_path: Path, cpu_has_bfloat16: Has, has: bool) -> None:
    cpu_has_bfloat16(has)
    config = make_run(tmp_path, steps=3, precision="auto")
    interrupted = make_trainer(config)
    next(interrupted.steps())
    interrupted.save()
    expected = losses(interrupted)
    cpu_has_bfloat16(not has)
    resumed = make_trainer(config)
    assert resumed.resume() == 1
    assert resumed.config.precision == interrupted.config.precision
    assert losses(resumed) == expected


def test_a_precision_other_than_the_checkpoints_is_refused(tmp_path: Path, cpu_has_bfloat16: Has) -> None:
    cpu_has_bfloat16(False)
    config = make_run(tmp_path, precision="auto")
    make_trainer(config).save()
    with pytest.raises(ConfigError, match="other settings: precision was float32 and is bfloat16"):
        make_trainer(replace(config, precision="bfloat16")).resume()


def test_a_contrastive_run_keeps_its_precision_on_another_device(tmp_path: Path, cpu_has_bfloat16: Has) -> None:
    config = shapes.make_run(tmp_path, steps=1, precision="auto")
    cpu_has_bfloat16(False)
    first = ContrastiveTrainer(config, CPU)
    assert first.config.precision == "float32"
    first.save()
    cpu_has_bfloat16(True)
    resumed = ContrastiveTrainer(config, CPU)
    assert resumed.resume() == 0
    assert resumed.config.precision == "float32"


def test_emulated_arithmetic_is_named(cpu_has_bfloat16: Has) -> None:
    cpu_has_bfloat16(False)
    assert describe_precision("float32", CPU) == "forward passes are in float32 on cpu"
    assert describe_precision("bfloat16", CPU) == (
        "forward passes are in bfloat16 on cpu, which this cpu emulates: "
        "a step may take many times as long as in float32"
    )
    cpu_has_bfloat16(True)
    assert describe_precision("bfloat16", CPU) == "forward passes are in bfloat16 on cpu"
