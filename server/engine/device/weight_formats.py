"""Validates the configured format of the decoder's weights for this device and model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from model.config import FlamingoConfig
from model.footprint import Footprint
from model.products import FLOAT32, Format
from model.quantised import WeightFormat
from server.settings import Settings, SettingsError

# the first one whose GPUs multiply fp8
FP8_CAPABILITY = (8, 9)
DTYPES: dict[WeightFormat, tuple[torch.dtype, ...]] = {
    "fp8": (torch.bfloat16,),
    "int8": (torch.bfloat16, torch.float16),
    "int4": (torch.bfloat16, torch.float16),
}


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """The formats of the decoder's weights; `/version` shows the name, which keys stored vectors unless it is native."""

    name: Literal["native", "fp8", "int8", "int4"] = "native"
    layers: tuple[Format, ...] = ()  # on a CPU: those that are measured; none: as loaded
    packed: WeightFormat | None = None  # on a GPU

    @classmethod
    def of(cls, settings: Settings, config: FlamingoConfig, device: torch.device, dtype: torch.dtype) -> WeightFormats:
        """Return the formats of the settings; auto keeps a model's own four bits on a CPU, and otherwise the dtype.

        Raises `SettingsError`.
        """
        is_on_cpu, is_whole = device.type == "cpu", settings.tensor_parallel == 1
        if settings.vision_format == "bfloat16" and not is_on_cpu:
            raise SettingsError(f"vision_format: bfloat16 is for a CPU, and the device is {device.type}")
        name = settings.weight_format
        if name == "auto":
            is_q4 = config.language_model.weights == "q4"
            name = "int4" if is_on_cpu and is_whole and settings.dtype == "auto" and is_q4 else "native"
        if name == "native":
            return cls(layers=FLOAT32 if is_on_cpu and is_whole and dtype == torch.float32 else ())
        if not is_on_cpu:
            _check_packed(name, config, device, dtype)
            return cls(name, packed=name)
        if name == "fp8":
            raise SettingsError(
                "weight_format: fp8 is for a GPU, and the device is cpu; auto, int4, int8 and native are accepted"
            )
        return cls(name, layers=(name, "bfloat16"))


def _check_packed(name: WeightFormat, config: FlamingoConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `SettingsError` if the device, the dtype or the model cannot be combined with a format of packed weights."""
    if name == "fp8" and (obstacle := _fp8_obstacle(device)):
        raise SettingsError(f"weight_format: fp8 {obstacle}; auto, int4, int8 and native are accepted")
    if dtype not in DTYPES[name]:
        accepted = " or ".join(str(accepted).removeprefix("torch.") for accepted in DTYPES[name])
        raise SettingsError(f"weight_format: {name} needs dtype {accepted}, not {str(dtype).removeprefix('torch.')}")
    if Footprint.of(config, dtype, weight_format=name) == Footprint.of(config, dtype):
        raise SettingsError(f"weight_format: {name} does not support {config.name}: its matrices are too narrow")


def _fp8_obstacle(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "is for GPUs of NVIDIA"
    if (capability := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        needed, actual = (".".join(map(str, version)) for version in (FP8_CAPABILITY, capability))
        return f"needs a GPU of compute capability {needed}, and this one has {actual}"
    return None
