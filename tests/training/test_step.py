"""Tests of one step: its gradient is that of equation 2 of the paper, clipped, and the update has the step's rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.toy import make_run, make_trainer
from training.batch import collate
from training.bridge import trained_parameters
from training.config import OptimConfig, TrainConfig
from training.distributed import World
from training.mixture import merge_media
from training.trainer import Trainer

# the weights stay as they are, so that every step has the gradient at the start
AT_REST = OptimConfig(learning_rate=0.0, clip=1e9)


class LaggingWorld(World):
    """A process whose partners have one more forward, which it has to run along."""

    def max(self, value: int) -> int:
        return value + 1


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trainer.stepper.named_parameters}  # type: ignore[union-attr]


def expected_gradients(config: TrainConfig, step: int) -> dict[str, Tensor]:
    """Return the gradient of the sum over sets of weight times mean loss, each set of a step in one forward."""
    trainer = make_trainer(config)
    loss, total = trainer.stepper.loss, torch.zeros(())
    for data_set in trainer.stepper.mixture.sets:
        for _ in range(step + 1):
            examples = data_set.batch()
        batch = collate([example.tokens for example in examples], merge_media(examples), torch.device("cpu"))
        total = total + data_set.weight * loss(batch) / batch.num_targets
    named = dict(trained_parameters(loss))
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


@pytest.mark.parametrize("weights", [(1.0, 0.2), (0.03, 1.0)])
def test_a_steps_gradient_is_the_weighted_sum_over_its_sets(tmp_path: Path, weights: tuple[float, float]) -> None:
    config = make_run(tmp_path)
    sets = tuple(replace(data_set, weight=weight) for data_set, weight in zip(config.sets, weights, strict=True))
    config = replace(config, sets=sets, optim=AT_REST)
    trainer = make_trainer(config)
    for step in range(2):
        trainer.stepper.step(step)
        expected = expected_gradients(config, step)
        assert any(bool(gradient.any()) for gradient in expected.values())
        for name, gradient in gradients(trainer).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=f"{name} of step {step}")


def test_the_whole_gradient_is_clipped_to_a_norm(tmp_path: Path) -> None:
    trainer = make_trainer(replace(make_run(tmp_path), optim=replace(AT_REST, clip=1e-3)))
    report = trainer.stepper.step(0)
    assert report.gradient_norm > 0.01
    squares = [float(gradient.square().sum()) for gradient in gradients(trainer).values()]
    assert sum(squares) ** 0.5 == pytest.approx(1e-3, rel=1e-3)


def test_a_clip_of_zero_clips_nothing(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    unclipped, large = (make_trainer(replace(config, optim=replace(AT_REST, clip=clip))) for clip in (0.0, 1e9))
    assert unclipped.stepper.step(0).gradient_norm == large.stepper.step(0).gradient_norm
    for name, gradient in gradients(unclipped).items():
        assert torch.equal(gradient, gradients(large)[name]), name


def test_an_update_has_the_learning_rate_of_its_step(tmp_path: Path) -> None:
    """Adam's first update has the size of the learning rate, whatever the gradient."""
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=4, gate_rate=3.0)
    trainer = make_trainer(replace(make_run(tmp_path), optim=optim))
    gate = trainer.model.state_dict()["gated.0.attn_gate"]
    before = gate.clone()
    assert trainer.stepper.step(0).learning_rate == pytest.approx(2.5e-3)
    assert float((gate - before).abs()) == pytest.approx(3 * 2.5e-3, rel=1e-3)


def test_a_forward_that_keeps_pace_with_other_processes_adds_nothing(tmp_path: Path) -> None:
    config = replace(make_run(tmp_path), optim=AT_REST)
    alone, lagging = make_trainer(config), make_trainer(config, LaggingWorld())
    assert alone.stepper.step(0).losses == lagging.stepper.step(0).losses
    for name, gradient in gradients(lagging).items():
        torch.testing.assert_close(gradient, gradients(alone)[name], msg=name)
