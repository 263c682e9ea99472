"""Linear layers of the decoder and the gated layers in 8 or 4 bits, for GPU kernels that read the packed weights.

Norms, token tables, the output head, the maps from visual tokens to media pages, the resampler and the vision encoder stay
as loaded, and so does a matrix of a shape that a format's kernel does not take. Formats for a CPU are in `model/cpu.py`:
measurements choose them for each shape of matrix, after the gates were folded.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kernels.fp8 import FP8, fp8_linear, quantise_rows_reference
from kernels.weight_only import GROUP, int4_linear, int8_linear, pack_int4, quantise_int8

WeightFormat = Literal["fp8", "int8", "int4"]
# not packed: media pages are computed once per image, and stay the same in all formats
LOADED = "key_value"
FEATURES = 16  # the number of output features must be a multiple of this for all kernels


class QuantisedLinear(nn.Module):
    """A linear map x [T, K] -> [T, N] without gradients, whose weights are packed; the bias stays as loaded."""

    columns: ClassVar[int]  # the number of columns must be a multiple of this

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias

    def multiply(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        """Return the buffers of a matrix [N, K], by their names."""
        raise NotImplementedError

    def scale_features(self, factors: Tensor) -> None:
        """Multiply each output feature by a factor [N] or [1], in place."""
        raise NotImplementedError

    @classmethod
    def takes(cls, linear: nn.Linear) -> bool:
        return linear.out_features % FEATURES == 0 and linear.in_features % cls.columns == 0


class ScaledLinear(QuantisedLinear):
    """A linear map of 8 bits per weight, with a float32 scale per feature."""

    packed: Tensor
    scale: Tensor
    dtype: ClassVar[torch.dtype]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("packed", torch.empty(linear.weight.shape, dtype=self.dtype))
        self.register_buffer("scale", torch.empty(linear.out_features))

    def scale_features(self, factors: Tensor) -> None:
        self.scale.mul_(factors)


class Fp8Linear(ScaledLinear):
    """A linear map in fp8 (e4m3); activations become fp8 with a scale per token."""

    dtype = FP8
    columns = 16

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        packed, scale = quantise_rows_reference(weight)
        return {"packed": packed, "scale": scale.squeeze(1)}

    def multiply(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.packed, self.scale)


class Int8Linear(ScaledLinear):
    """A linear map in int8."""

    dtype = torch.int8
    columns = 64

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        packed, scale = quantise_int8(weight)
        return {"packed": packed, "scale": scale}

    def multiply(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.packed, self.scale)


class Int4Linear(QuantisedLinear):
    """A linear map in int4: groups of 32 columns, each with a scale and a zero in bfloat16."""

    packed: Tensor
    constants: Tensor
    columns = 2 * GROUP

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        num_features, width = linear.weight.shape
        self.register_buffer("packed", torch.empty(width // (2 * GROUP), num_features, GROUP, dtype=torch.uint8))
        self.register_buffer("constants", torch.empty(width // GROUP, num_features, 2, dtype=torch.bfloat16))

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        packed, constants = pack_int4(weight)
        return {"packed": packed, "constants": constants}

    def multiply(self, x: Tensor) -> Tensor:
        return int4_linear(x, self.packed, self.constants)

    def scale_features(self, factors: Tensor) -> None:
        self.constants.copy_(self.constants.float() * factors[:, None])


KINDS: dict[WeightFormat, type[QuantisedLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear, "int4": Int4Linear}


def replace_linears(weight_format: WeightFormat, *parts: nn.Module) -> None:
    """Replace the linear layers of `parts`, which are on the meta device, by packed layers without values."""
    kind = KINDS[weight_format]
    for part in parts:
        for parent in list(part.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and name != LOADED and kind.takes(child):
                    setattr(parent, name, kind(child))


def packed_tensors(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """Return the packed tensors of a layer's weight, by their names in the model; None if this tensor is not packed."""
    path, _, own_name = name.rpartition(".")
    layer = model.get_submodule(path)
    if own_name != "weight" or not isinstance(layer, QuantisedLinear):
        return None
    return {f"{path}.{key}": buffer for key, buffer in layer.pack(tensor).items()}
