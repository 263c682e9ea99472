"""EfficientNet-Lite0, the vision encoder of the default model, with the names of timm's tensors.

timm has the same network, but `import timm` loads torchvision and torch's compiler, which doubles a worker's imports.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

NORM_EPS = 1e-3
STEM, HEAD = 32, 1280
# the stages: number of blocks, kernel size, stride of the first block, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Convolution(nn.Conv2d):
    """A convolution without bias, padded as in TensorFlow: if the padding is odd, right and below get one more."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, self.kernel_size[0], self.stride[0]))


def pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad the input of a convolution that has a stride; the others pad it by themselves."""
    if stride == 1:
        return x
    extra_y, extra_x = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
    return F.pad(x, (extra_x // 2, extra_x - extra_x // 2, extra_y // 2, extra_y - extra_y // 2))


class PackedConvolution(nn.Module):
    """A convolution with bias and its activation as one call of oneDNN, for inference on a CPU.

    The weights are kept in oneDNN's layout; torch's own convolution would bring them into it in each call.
    """

    def __init__(self, convolution: Convolution, act: nn.Module) -> None:
        super().__init__()
        self.bias = convolution.bias
        self._kernel, self._stride = convolution.kernel_size[0], convolution.stride[0]
        padding = [int(size) for size in convolution.padding]
        self._shape = padding, [self._stride] * 2, [1, 1], convolution.groups
        self._packed = torch.ops.mkldnn._reorder_convolution_weight(convolution.weight, *self._shape)
        self._act = ("hardtanh", [0.0, 6.0], "") if isinstance(act, nn.ReLU6) else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        x = pad(x, self._kernel, self._stride)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *self._shape, *self._act)
        return y


class Norm(nn.BatchNorm2d):
    """A batch norm and the activation after it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels, NORM_EPS)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(x))
        return y


class Separable(nn.Module):
    """The first stage's block: a depthwise convolution, then a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = Convolution(inputs, inputs, kernel, stride, groups=inputs)
        self.bn1 = Norm(inputs, nn.ReLU6(inplace=True))
        self.conv_pw = Convolution(inputs, outputs)
        self.bn2 = Norm(outputs, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(x))))
        return y


class InvertedResidual(nn.Module):
    """An expansion, a depthwise convolution and a projection, with a residual connection if the sizes are equal."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.conv_pw = Convolution(inputs, width)
        self.bn1 = Norm(width, nn.ReLU6(inplace=True))
        self.conv_dw = Convolution(width, width, kernel, stride, groups=width)
        self.bn2 = Norm(width, nn.ReLU6(inplace=True))
        self.conv_pwl = Convolution(width, outputs)
        self.bn3 = Norm(outputs, nn.Identity())
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn3(self.conv_pwl(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))))
        return y + x if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """The network up to its last feature map: pixels [F, 3, h, w] -> [F, 1280, h / 32, w / 32], rounded up."""

    num_features: ClassVar[int] = HEAD
    feature_info: ClassVar[list[dict[str, int]]] = [{"reduction": 32}]

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = Convolution(3, STEM, 3, 2)
        self.bn1 = Norm(STEM, nn.ReLU6(inplace=True))
        stages, inputs = [], STEM
        for count, kernel, stride, expansion, channels in STAGES:
            stages.append(nn.Sequential(*_blocks(count, inputs, channels, kernel, stride, expansion)))
            inputs = channels
        self.blocks = nn.Sequential(*stages)
        self.conv_head = Convolution(inputs, HEAD)
        self.bn2 = Norm(HEAD, nn.ReLU6(inplace=True))

    def forward_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(pixels)))))
        return features


def _blocks(count: int, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> list[nn.Module]:
    if expansion == 1:
        assert count == 1
        return [Separable(inputs, outputs, kernel, stride)]
    first = InvertedResidual(inputs, outputs, kernel, stride, expansion)
    return [first, *(InvertedResidual(outputs, outputs, kernel, 1, expansion) for _ in range(count - 1))]


@torch.no_grad()
def fold_batch_norms(encoder: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in float32, for inference; its activation `act` stays.

    The order of the parts of each module must be that of its forward.
    """
    for parent in list(encoder.modules()):
        for (_, convolution), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                _fold(convolution, norm)
                setattr(parent, name, norm.act)


@torch.no_grad()
def pack_convolutions(encoder: EfficientNetLite0) -> None:
    """Replace each convolution and the activation after it by one call, once the batch norms are folded.

    A network with a weight that is not finite stays as it is: oneDNN's activation turns NaN into a number, which would hide
    the fault.
    """
    if not all(parameter.isfinite().all() for parameter in encoder.parameters()):
        return
    for parent in list(encoder.modules()):
        for (name, convolution), (act_name, act) in pairwise(list(parent.named_children())):
            if isinstance(convolution, Convolution):
                setattr(parent, name, PackedConvolution(convolution, act))
                setattr(parent, act_name, nn.Identity())


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    bias = None if convolution.bias is None else convolution.bias.float()
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, scale, shift = (x.float() for x in tensors if x is not None)
    folded = fuse_conv_bn_weights(convolution.weight.float(), bias, mean, variance, norm.eps, scale, shift)
    dtype = convolution.weight.dtype
    convolution.weight, convolution.bias = (nn.Parameter(x.to(dtype), requires_grad=False) for x in folded)
