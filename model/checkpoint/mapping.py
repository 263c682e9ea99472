"""How a foreign checkpoint's tensors become ours: a plan says, for each of our tensors, which of theirs make it up.

A plan comes from a family's table and a configuration, before any tensor is read; so all that is missing, left over or
of another shape is known, and said, at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.checkpoint.tensor_files import Shape, refuse_misfits


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the foreign checkpoint, by its name there."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Recipe:
    """One of our tensors: the rows of its sources one after the other, then rearranged."""

    sources: tuple[Source, ...]
    rearrange: Callable[[Tensor], Tensor] | None = None

    def cook(self, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors[source.name] for source in self.sources]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if self.rearrange is None else self.rearrange(whole)


Plan = dict[str, Recipe]


def convert(what: str, plan: Plan, tensors: Mapping[str, Tensor], ignored: re.Pattern[str]) -> dict[str, Tensor]:
    """Our tensors from theirs. A name that matches `ignored` may be there or not: a buffer, a part that is not used."""
    wanted = {source.name: source.shape for recipe in plan.values() for source in recipe.sources}
    found = {name: tuple(tensors[name].shape) for name in wanted if name in tensors}
    refuse_misfits(
        what,
        missing=[name for name in wanted if name not in found],
        unexpected=[name for name in tensors if name not in wanted and not ignored.search(name)],
        misshapen={name: (shape, wanted[name]) for name, shape in found.items() if shape != wanted[name]},
    )
    return {name: recipe.cook(tensors) for name, recipe in plan.items()}
