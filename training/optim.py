"""AdamW as in the paper: weight decay on the gated layers' matrices, none on the resampler; warm-up, then constant.

Gates, norms and new rows are not decayed either; an expert that is trained is decayed as the gated layers are. What moves
is float32, whatever the forward runs in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from training.config import OptimConfig

TABLES = (".embed.", ".head.", ".positions.")


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        decay = config.weight_decay if decays(name, parameter) else 0.0
        groups.setdefault((decay, relative_rate(name, config)), []).append(parameter)
    listed = [{"params": group, "weight_decay": decay, "scale": scale} for (decay, scale), group in groups.items()]
    return torch.optim.AdamW(listed, lr=config.learning_rate, betas=config.betas)


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


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]
