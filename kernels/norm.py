"""RMSNorm and LayerNorm over the last axis, statistics in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y * weight.float()).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = x.float()
    y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D]"""
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., D], weight [D], bias [D] -> [..., D]"""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
