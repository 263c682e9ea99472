"""Chooses the number format of a run's forward passes: bfloat16 on devices that compute it fast, otherwise float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from kernels.backend import has_bfloat16
from training.config import Precision, TrainConfig
from training.contrastive.config import ContrastiveConfig
from training.distributed import World

Config = TypeVar("Config", TrainConfig, ContrastiveConfig)


def with_precision(config: Config, world: World, before: Mapping[str, Any] | None) -> Config:
    """Return the configuration with a precision in place of `auto`.

    A resumed run keeps the precision in `before`, the settings of its checkpoint, also on another device.
    """
    if config.precision != "auto":
        return config
    return replace(config, precision=before["precision"] if before else _fastest(world))


def describe_precision(precision: Precision, device: torch.device) -> str:
    slow = precision == "bfloat16" and not _computes_bfloat16(device)
    advice = f", which this {device.type} emulates: a step may take many times as long as in float32" if slow else ""
    return f"forward passes are in {precision} on {device.type}{advice}"


def _fastest(world: World) -> Precision:
    # one answer for all processes, whatever their devices are
    return "float32" if world.max(int(not _computes_bfloat16(world.device))) else "bfloat16"


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bfloat16()
