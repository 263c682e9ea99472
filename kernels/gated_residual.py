"""x + tanh(gate) * branch: how a gated layer adds itself to the language model (paper, figure 4).

For training, and for serving with the gates left apart; otherwise tanh(gate) is folded into the branch's last weight.
"""

from __future__ import annotations

from torch import Tensor


def gated_residual_reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + gate.float().tanh() * branch.float()).to(x.dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x [T, D], branch [T, D], gate [1] or [D] -> [T, D]"""
    return gated_residual_reference(x, branch, gate)
