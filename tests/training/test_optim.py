"""Tests of the optimizer's groups and the learning rate's schedule."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from model.flamingo import Flamingo
from tests.tiny_models import CONFIGS, tiny_model
from training.bridge import freeze, trained_parameters
from training.config import OptimConfig
from training.optim import build_optimizers, is_decayed, learning_rate_at, set_learning_rate


def groups_of(model: Flamingo, config: OptimConfig, at_rate: float | None = None) -> list[dict[str, Any]]:
    optimizers = build_optimizers(trained_parameters(model), config)
    if at_rate is not None:
        set_learning_rate(optimizers, at_rate)
    return [group for optimizer in optimizers for group in optimizer.param_groups]


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_only_the_gated_layers_matrices_decay_and_every_parameter_is_in_one_group(
    matrices: Literal["adamw", "muon"],
) -> None:
    model = tiny_model(CONFIGS["flamingo"])
    freeze(model, torch.float32)
    names = {id(parameter): name for name, parameter in trained_parameters(model)}
    groups = groups_of(model, OptimConfig(weight_decay=0.1, gate_rate=10.0, matrices=matrices))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {n for n, p in trained_parameters(model) if n.startswith("gated.") and p.dim() == 2}


def test_gates_and_the_resampler_have_their_own_learning_rates() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    freeze(model, torch.float32)
    groups = groups_of(model, OptimConfig(gate_rate=10.0, resampler_rate=0.5), at_rate=0.5)
    names = {id(parameter): name for name, parameter in trained_parameters(model)}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if name.endswith("_gate")} == {5.0}
    assert {rate for name, rate in rates.items() if "resampler." in name} == {0.25}
    assert {rate for name, rate in rates.items() if "resampler." not in name and not name.endswith("_gate")} == {0.5}


def test_muon_updates_only_the_layers_matrices_at_its_own_learning_rate() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    freeze(model, torch.float32)
    config = OptimConfig(resampler_rate=0.5, matrices="muon", muon_rate=8.0)
    names = {id(parameter): name for name, parameter in trained_parameters(model)}
    adam, muon = build_optimizers(trained_parameters(model), config)
    assert isinstance(adam, torch.optim.AdamW)
    assert isinstance(muon, torch.optim.Muon)
    set_learning_rate((adam, muon), 0.5)
    rates = {names[id(p)]: group["lr"] for group in muon.param_groups for p in group["params"]}
    assert rates["gated.0.attention.query.weight"] == 4.0
    assert rates["resampler.layers.0.attention.key_value.weight"] == 2.0
    assert not {name for name in rates if "norm" in name or "embeddings" in name or name == "resampler.input.weight"}
    assert "resampler.latents" not in rates


def test_the_learning_rate_warms_up_and_stays_constant() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_at(step, 100, config) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["cosine", "linear", "exponential"])
def test_a_decay_falls_to_its_end_value(decay: str) -> None:
    config = OptimConfig(learning_rate=2.0, warmup_steps=0, decay=decay, end=0.25)  # type: ignore[arg-type]
    schedule = [learning_rate_at(step, 100, config) for step in range(0, 101, 10)]
    assert schedule == sorted(schedule, reverse=True)
    assert schedule[0] == pytest.approx(2.0)
    assert schedule[-1] == pytest.approx(0.5)


def test_a_linear_decay_may_end_at_zero() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, decay="linear", end=0.0)
    assert [learning_rate_at(step, 4, config) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_last_step_of_a_decay_is_one_step_before_its_end() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=2, decay="linear", end=0.2)
    assert [learning_rate_at(step, 6, config) for step in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_a_trained_experts_matrices_decay_and_its_tables_do_not() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    freeze(model, torch.float32, ("vision", "language_model"))
    decayed = {name for name, parameter in trained_parameters(model) if is_decayed(name, parameter)}
    assert "vision.encoder.patch_embed.proj.weight" in decayed
    assert "language_model.layers.0.attention.qkv.weight" in decayed
    assert not [name for name in decayed if "norm" in name or "pos_embed" in name or ".embed." in name]


def test_a_cosine_decay_ends_at_a_tenth_by_default() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, decay="cosine")
    assert learning_rate_at(0, 100, config) == pytest.approx(1.0)
    assert learning_rate_at(100, 100, config) == pytest.approx(0.1)
