"""AdamW as in the paper: weight decay on the gated layers' matrices only, and a warm-up to a constant learning rate.

The resampler, gates, norms and new rows are not decayed; a trained expert is decayed like the gated layers. Trained
parameters are float32, whatever the forward's precision. Muon (Jordan et al., 2024) may update the layers' matrices
instead. Its steps have the same length in every direction, so a bridge that is trained on few examples keeps more
directions than those that the examples need.
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


def build_optimizers(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> tuple[torch.optim.Optimizer, ...]:
    """Assign every parameter to one optimizer; a group's `scale` is its learning rate relative to the run's."""
    named = list(parameters)
    matrices = [(n, p) for n, p in named if config.matrices == "muon" and is_layer_matrix(n, p)]
    matrix_names = {name for name, _ in matrices}
    rest = [(name, parameter) for name, parameter in named if name not in matrix_names]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(_groups(rest, config), lr=config.learning_rate, betas=config.betas))
    if matrices:
        groups = _groups(matrices, config, config.muon_rate)
        optimizers.append(torch.optim.Muon(groups, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw"))
    return tuple(optimizers)


def _groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, factor: float = 1.0
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = config.weight_decay if is_decayed(name, parameter) else 0.0
        groups.setdefault((decay, factor * relative_rate(name, config)), []).append(parameter)
    return [{"params": group, "weight_decay": decay, "scale": scale} for (decay, scale), group in groups.items()]


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether the parameter is a matrix between hidden states.

    Tables of latents, tokens or positions are not, nor is the projection that reads the encoder's features.
    """
    return parameter.dim() == 2 and any(part in name for part in LAYERS) and name.endswith(".weight")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices and filters, but not to tables of tokens or positions."""
    is_table = any(part in name for part in TABLES)
    return parameter.dim() >= 2 and name.endswith(".weight") and "resampler." not in name and not is_table


def relative_rate(name: str, config: OptimConfig) -> float:
    if name.endswith("_gate"):
        return config.gate_rate
    return config.resampler_rate if "resampler." in name else 1.0


def learning_rate_at(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of step 0, 1, ...: a linear warm-up from zero, then constant or a decay to `end` of it.

    The decay starts with the step after the warm-up and would reach `end` at step `steps`, which the run does not have.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * _remaining_share(min(1.0, progress), config)


def _remaining_share(progress: float, config: OptimConfig) -> float:
    """Return the share of the learning rate that remains after the share `progress` of the decay."""
    if config.decay == "exponential":
        return config.end**progress
    remaining = 1.0 - progress if config.decay == "linear" else (1.0 + math.cos(math.pi * progress)) / 2
    return config.end + (1.0 - config.end) * remaining


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value * group["scale"]
