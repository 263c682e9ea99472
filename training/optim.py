"""AdamW as in the paper: weight decay on the gated layers' matrices, none on the resampler; warm-up, then constant.

Gates, norms and new rows are not decayed either; an expert that is trained is decayed as the gated layers are. What moves
is float32, whatever the forward runs in. The layers' matrices may be moved by Muon (Jordan et al., 2024) instead, whose
steps are as long in every direction: a bridge of few examples then keeps more than the few directions that they need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from training.config import OptimConfig

TABLES = (".embed.", ".head.", ".positions.")
LAYERS = ("gated.", "layers.")


def make_optimizers(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> tuple[torch.optim.Optimizer, ...]:
    """Every parameter in one of them; a group's `scale` is its learning rate in terms of the run's."""
    named = list(parameters)
    matrices = [(n, p) for n, p in named if config.matrices == "muon" and is_layer_matrix(n, p)]
    moved = {name for name, _ in matrices}
    rest = [(name, parameter) for name, parameter in named if name not in moved]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(_groups(rest, config), lr=config.learning_rate, betas=config.betas))
    if matrices:
        groups = _groups(matrices, config, config.muon_rate)
        optimizers.append(torch.optim.Muon(groups, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw"))
    return tuple(optimizers)


def _groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, times: float = 1.0) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = config.weight_decay if decays(name, parameter) else 0.0
        groups.setdefault((decay, times * relative_rate(name, config)), []).append(parameter)
    return [{"params": group, "weight_decay": decay, "scale": scale} for (decay, scale), group in groups.items()]


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """A matrix between states; a table of latents, tokens or places is none, nor what reads the encoder's features."""
    return parameter.dim() == 2 and any(part in name for part in LAYERS) and name.endswith(".weight")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and filters; no table of tokens or places."""
    is_table = any(part in name for part in TABLES)
    return parameter.dim() >= 2 and name.endswith(".weight") and "resampler." not in name and not is_table


def relative_rate(name: str, config: OptimConfig) -> float:
    if name.endswith("_gate"):
        return config.gate_rate
    return config.resampler_rate if "resampler." in name else 1.0


def rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step 0, 1, ...: linear from zero, then constant or down to `end` of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * _left(min(1.0, done), config)


def _left(done: float, config: OptimConfig) -> float:
    """The share of the learning rate that is left."""
    if config.decay == "exponential":
        return config.end**done
    course = 1.0 - done if config.decay == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    return config.end + (1.0 - config.end) * course


def set_rate(optimizers: Iterable[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value * group["scale"]
