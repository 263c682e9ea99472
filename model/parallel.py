"""Communication between the ranks of a divided model: sums of partial products, and norms over all heads.

Each rank computes only its heads and its hidden features. The second matrix of each branch has only the columns for these,
so its product is one term of a sum: an all-reduce then gives all ranks the same numbers again. A norm over
the features of all heads needs the moments of all ranks. Nothing else is exchanged: each rank has the whole token tables,
so no logits are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.flamingo import Flamingo
from model.layers import LayerNorm, RMSNorm


class Group(Protocol):
    """The ranks of a model, from the view of one rank. All ranks must call the same methods in the same order."""

    def add_up(self, x: Tensor) -> None:
        """Replace x by its sum over all ranks."""

    def gather(self, x: Tensor) -> Tensor:
        """Return the x of all ranks, stacked in their order."""


class ProcessGroup:
    """The ranks of a model as processes that torch connects, by a `ProcessGroupGloo` or a `ProcessGroupNCCL`."""

    def __init__(self, processes: Any) -> None:
        self._processes = processes

    def add_up(self, x: Tensor) -> None:
        self._processes.allreduce([x]).wait()

    def gather(self, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(self._processes.size())]
        self._processes.allgather([gathered], [x]).wait()
        return torch.stack(gathered)


class SummedLinear(nn.Linear):
    """A linear layer of which each rank has some columns: its product is summed over the ranks, then the bias is added."""

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        self._group.add_up(y)
        return y if self.bias is None else y + self.bias


class SharedNorm(nn.Module):
    """A norm over features of which each rank has an equal number: the ranks exchange the moments of every row."""

    def __init__(self, norm: RMSNorm | LayerNorm, group: Group) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = norm.weight
        self.bias = norm.bias if isinstance(norm, LayerNorm) else None
        self._is_centred = isinstance(norm, LayerNorm)
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        own_mean = y.mean(-1, keepdim=True) if self._is_centred else torch.zeros_like(y[..., :1])
        own_variance = (y - own_mean).square().mean(-1, keepdim=True)
        means, variances = self._group.gather(torch.cat([own_mean, own_variance], -1)).split(1, -1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        y = (y - mean) * (variance + self.eps).rsqrt() * self.weight.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def join(model: Flamingo, group: Group) -> Flamingo:
    """Connect a rank's model with the others of its group, in place: for inference, before `prepare_for_inference`."""
    for module, name in _summed(model):
        setattr(module, name, SummedLinear(getattr(module, name), group))
    for layer in model.language_model.layers:
        for name in ("query_norm", "key_norm"):
            if (norm := getattr(layer.attention, name)) is not None:
                setattr(layer.attention, name, SharedNorm(norm, group))
    return model


def _summed(model: Flamingo) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules with a product of which each rank has a term, and the names of these products."""
    for layer in (*model.language_model.layers, *model.gated_layers().values()):
        yield layer.attention, "output"
        yield layer.feed_forward, "down"
