"""Conversion of a foreign checkpoint's tensors: a plan names, for each of our tensors, the foreign tensors that make it up.

A plan comes from a family's table of names and the shapes of our empty model, before any tensor is read; one error then
lists all tensors that are missing, unexpected or of another shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from model.folder import Shape, check_shapes

# our tensor, or our module for its weight and bias -> theirs, or those whose rows make up ours; {i} is the layer
Names: TypeAlias = Mapping[str, str | tuple[str, ...]]
Rearrange: TypeAlias = Callable[[Tensor], Tensor]

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the foreign checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Recipe:
    """One of our tensors: the concatenated rows of its sources, rearranged, in our shape."""

    sources: tuple[Source, ...]
    shape: Shape
    rearrange: Rearrange | None = None

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors[source.name] for source in self.sources]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole if self.rearrange is None else self.rearrange(whole)).reshape(self.shape)


Plan = dict[str, Recipe]


def plan(
    shapes: Mapping[str, Shape],
    names: Names,
    ours: str = "",
    theirs: str = "",
    *,
    stored: Mapping[str, Shape] = NONE,
    rows: Mapping[str, tuple[int, ...]] = NONE,
    rearrange: Mapping[str, Rearrange] = NONE,
) -> Plan:
    """Plan the tensors of one of our modules; `ours` and `theirs` are prefixes of its names.

    `stored` are the shapes of foreign tensors that differ from ours. Of our modules by their name in the table, `rows` are
    the numbers of rows of the sources where these are not equal, and `rearrange` changes the order of the rows.
    """
    recipes: Plan = {}
    for name, shape in shapes.items():
        layer, pattern = LAYER.search(name), LAYER.sub("{i}", name, count=1)
        module, _, tensor = pattern.rpartition(".")
        sources = _several(names[pattern]) if pattern in names else [f"{s}.{tensor}" for s in _several(names[module])]
        first, *rest = stored.get(name, shape)
        counts = rows.get(module, ())
        if len(counts) != len(sources):
            counts = (first // len(sources),) * len(sources)
        recipes[ours + name] = Recipe(
            tuple(
                Source(theirs + source.format(i=layer and layer[0]), (count, *rest))
                for source, count in zip(sources, counts, strict=True)
            ),
            shape,
            rearrange.get(module),
        )
    return recipes


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def convert(
    origin: str, plan: Plan, tensors: Mapping[str, Tensor], ignored: re.Pattern[str] | None = None
) -> dict[str, Tensor]:
    """Convert their tensors to ours. A name that matches `ignored` (a buffer, an unused part) may be there or not."""
    expected = {source.name: source.shape for recipe in plan.values() for source in recipe.sources}
    stored = {name: tuple(tensors[name].shape) if name in expected else () for name in tensors}
    check_shapes(origin, expected, stored, ignored)
    return {name: recipe.apply(tensors) for name, recipe in plan.items()}
