"""Methods of classification. Methods by likeness share an interface and have a file each; a method may have several parts.

A method by likeness is loaded on first use, because importing scikit-learn takes a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Final

from server.fewshot.methods.likeness import LikenessMethod


@dataclass(frozen=True, slots=True)
class Entry:
    """A method's class, and its maximum numbers of examples: for a fit, and for a comparison by leave-one-out."""

    module: str
    class_name: str
    max_examples: float = float("inf")
    max_left_out: float = float("inf")


METHODS: Mapping[str, Entry] = {
    "nearest_mean": Entry("nearest", "NearestMean"),
    "knn": Entry("nearest", "NearestNeighbours"),
    "linear": Entry("linear", "Linear", max_examples=4096, max_left_out=512),
}


# the part of the language model, and the method that has only this part
IN_CONTEXT: Final = "in_context"
BLEND: Final = "blend"
BLEND_PARTS = (IN_CONTEXT, "nearest_mean")


def parts_of(method: str) -> tuple[str, ...]:
    """Return the names of a method's parts, whose log-probabilities are added."""
    return BLEND_PARTS if method == BLEND else (method,)


@cache
def load_method(name: str) -> LikenessMethod:
    """Return the method of a name in `METHODS`."""
    entry = METHODS[name]
    method: LikenessMethod = getattr(import_module(f"{__name__}.{entry.module}"), entry.class_name)()
    return method
