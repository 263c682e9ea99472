"""The parts that the resampler, the gated layers and the decoder share: norms, feed-forward, and a token table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rows import add_layer_norm, add_linear_, add_rms_norm, layer_norm, rms_norm, swiglu
from model.config import Activation, Norm


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + branch and its norm."""
        return add_rms_norm(x, branch, self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def of_sum(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + branch and its norm."""
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps)


def make_norm(kind: Norm, dim: int, eps: float, bias: bool = True) -> RMSNorm | LayerNorm:
    return RMSNorm(dim, eps) if kind == "rms_norm" else LayerNorm(dim, eps, bias)


class FeedForward(nn.Module):
    """A projection up, an activation, and a projection down; if gated (SwiGLU), `up` holds [gate; up]."""

    def __init__(
        self, dim: int, hidden: int, activation: Activation, *, gated: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gated = gated
        self.up = nn.Linear(dim, 2 * hidden if gated else hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    @property
    def is_swiglu(self) -> bool:
        return self.gated and self.activation is F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activated(self.up(x)))

    def added_to(self, h: Tensor, x: Tensor) -> Tensor:
        """Return h + self(x) for h and x [T, D]; h may be overwritten, unless a gradient needs it."""
        hidden = self.activated(self.up(x))
        if type(self.down) is nn.Linear:  # other classes compute more than a product
            return add_linear_(h, hidden, self.down.weight, self.down.bias)
        return h + self.down(hidden)

    def activated(self, h: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(h)
        if self.is_swiglu:
            return swiglu(h)
        gate, up = h.chunk(2, dim=-1)
        return self.activation(gate) * up


def learned_rows(rows: int, dim: int) -> nn.Parameter:
    """Return a trainable table [rows, dim] with random values of standard deviation 0.02.

    On the meta device it has no values; drawing them there would import torch's compiler, which takes a second.
    """
    table = torch.empty(rows, dim)
    return nn.Parameter(table if table.is_meta else table.normal_(std=0.02))


class TokenTable(nn.Module):
    """A row per token id: the frozen vocabulary [V, D], then the rows of new tokens [A, D].

    It serves as embedding (`forward`) and as output head (`logits`); tied models use one table for both.
    """

    def __init__(self, vocab_size: int, num_new_tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = learned_rows(vocab_size, dim)
        self.new_rows = learned_rows(num_new_tokens, dim) if num_new_tokens else None

    def forward(self, token_ids: Tensor) -> Tensor:  # [T] -> [T, D]
        if self.new_rows is None:
            return F.embedding(token_ids, self.weight)
        frozen = self.weight.shape[0]
        known = F.embedding(token_ids.clamp(max=frozen - 1), self.weight)
        new = F.embedding((token_ids - frozen).clamp(min=0), self.new_rows)
        return torch.where((token_ids < frozen).unsqueeze(-1), known, new)

    def logits(self, x: Tensor) -> Tensor:  # [W, D] -> [W, V + A]
        known = F.linear(x, self.weight)
        if self.new_rows is None:
            return known
        return torch.cat([known, F.linear(x, self.new_rows)], dim=-1)
