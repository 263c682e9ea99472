"""Checks, before anything is loaded, that the settings can divide a model, and that its parts fit into the GPUs."""

from __future__ import annotations

import torch

from model.config import ConfigError, FlamingoConfig
from model.footprint import Footprint, smallest_size
from model.quantised import WeightFormat
from model.ranks import Rank, rank_config, sizes_of
from server.engine.device.memory import GIB
from server.settings import Settings, SettingsError

# settings of formats that pack whole matrices
PACKED = {"weight_format": ("fp8", "int8", "int4"), "vision_format": ("bfloat16",)}


def check_division(
    settings: Settings,
    config: FlamingoConfig,
    device: torch.device,
    dtype: torch.dtype,
    weight_format: WeightFormat | None,
) -> None:
    """Check the settings of a divided model, and that the weights of each part (or of a whole model) fit into a GPU.

    Raises `SettingsError`.
    """
    size = settings.tensor_parallel
    try:
        rank_config(config, Rank(0, size))
    except ConfigError as error:
        sizes = ", ".join(map(str, sizes_of(config)))
        raise SettingsError(f"tensor_parallel: {error}; {sizes} are accepted") from None
    for name, formats in PACKED.items():
        if size > 1 and (value := getattr(settings, name)) in formats:
            raise SettingsError(f"{name}: {value} is not supported with tensor_parallel {size}")
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory
        check_memory(config, dtype, size, device_bytes, weight_format)


def check_memory(
    config: FlamingoConfig,
    dtype: torch.dtype,
    size: int,
    device_bytes: int,
    weight_format: WeightFormat | None,
) -> None:
    """Raise `SettingsError` if the weights alone exceed the memory.

    The message has the number of devices that would be enough, except with a weight format, which needs an undivided model.
    """
    weights = sum(Footprint.of(config, dtype, Rank(0, size), weight_format).weights.values())
    if weights > device_bytes:
        smallest = smallest_size(config, dtype, device_bytes) if weight_format is None else None
        raise SettingsError(
            f"tensor_parallel: {size}, but then each device must hold {weights / GIB:.1f} GiB of weights, "
            f"and the first has {device_bytes / GIB:.1f} GiB" + (f"; {smallest} are enough" if smallest else "")
        )
