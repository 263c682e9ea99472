"""Methods that classify a query by its likeness to examples: one file per method, one interface for all."""

from __future__ import annotations

from collections.abc import Mapping

from server.fewshot.methods.likeness import Likeness
from server.fewshot.methods.linear import Linear
from server.fewshot.methods.nearest import NearestMean, NearestNeighbours

LIKENESS_METHODS: Mapping[str, Likeness] = {
    "nearest_mean": NearestMean(),
    "knn": NearestNeighbours(),
    "linear": Linear(),
}
