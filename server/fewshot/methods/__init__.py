"""Methods that classify a query by its likeness to examples: one file per method, one interface for all.

A method is loaded when it is first used: scikit-learn would take a second of every start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module

from server.fewshot.methods.likeness import Likeness

# the module and the class of each method
CLASSES: Mapping[str, tuple[str, str]] = {
    "nearest_mean": ("nearest", "NearestMean"),
    "knn": ("nearest", "NearestNeighbours"),
    "linear": ("linear", "Linear"),
}


@cache
def likeness_method(name: str) -> Likeness:
    """Return the method of a name in `CLASSES`."""
    module, class_name = CLASSES[name]
    method: Likeness = getattr(import_module(f"{__name__}.{module}"), class_name)()
    return method


def likeness_methods(names: Sequence[str] = tuple(CLASSES)) -> dict[str, Likeness]:
    return {name: likeness_method(name) for name in names}
