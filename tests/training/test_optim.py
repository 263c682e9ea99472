"""The optimizer's groups and the learning rate's course."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import CONFIGS, tiny_model
from training.bridge import bridge_parameters, freeze
from training.config import OptimConfig
from training.optim import make_optimizer, rate, set_rate


def test_only_the_gated_layers_matrices_decay_and_every_parameter_is_in_one_group() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    freeze(model, torch.float32)
    names = {id(parameter): name for name, parameter in bridge_parameters(model)}
    optimizer = make_optimizer(bridge_parameters(model), OptimConfig(weight_decay=0.1, gate_rate=10.0))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {n for n, p in bridge_parameters(model) if n.startswith("gated.") and p.dim() == 2}


def test_gates_take_larger_steps() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    freeze(model, torch.float32)
    optimizer = make_optimizer(bridge_parameters(model), OptimConfig(gate_rate=10.0))
    set_rate(optimizer, 0.5)
    names = {id(parameter): name for name, parameter in bridge_parameters(model)}
    rates = {names[id(p)].endswith("_gate"): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {True: 5.0, False: 0.5}


def test_warm_up_then_constant() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=4)
    assert [rate(step, 100, config) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_a_cosine_ends_at_a_tenth() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, decay="cosine")
    assert rate(0, 100, config) == pytest.approx(1.0)
    assert rate(100, 100, config) == pytest.approx(0.1)
