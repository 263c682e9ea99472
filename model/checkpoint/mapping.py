"""Conversion of a foreign checkpoint's tensors: a plan names, for each of our tensors, the foreign tensors that make it up.

A plan comes from a family's table of names and a configuration, before any tensor is read; one error then lists all tensors
that are missing, unexpected or of another shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.folder import Shape, check_shapes


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the foreign checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Recipe:
    """One of our tensors: the concatenated rows of its sources, rearranged."""

    sources: tuple[Source, ...]
    rearrange: Callable[[Tensor], Tensor] | None = None

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors[source.name] for source in self.sources]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if self.rearrange is None else self.rearrange(whole)


Plan = dict[str, Recipe]


def copied(theirs: str, ours: str, *shape: int) -> Plan:
    """Plan one tensor that only changes its name."""
    return {ours: Recipe((Source(theirs, shape),))}


def layer_norm(theirs: str, ours: str, dim: int) -> Plan:
    return copied(f"{theirs}.weight", f"{ours}.weight", dim) | copied(f"{theirs}.bias", f"{ours}.bias", dim)


def convert(
    origin: str, plan: Plan, tensors: Mapping[str, Tensor], ignored: re.Pattern[str] | None = None
) -> dict[str, Tensor]:
    """Convert their tensors to ours. A name that matches `ignored` (a buffer, an unused part) may be there or not."""
    expected = {source.name: source.shape for recipe in plan.values() for source in recipe.sources}
    stored = {name: tuple(tensors[name].shape) if name in expected else () for name in tensors}
    check_shapes(origin, expected, stored, ignored)
    return {name: recipe.apply(tensors) for name, recipe in plan.items()}
