"""A model's prior: the best method of classification by likeness in its own evaluation, for each number of examples.

A few examples are not enough to find the best method for them, so a server starts with this one. A model folder may have it
in `methods.json`, which `python -m evaluation.prior` writes; without the file it is the nearest mean.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import msgspec

from model.config import ConfigError

# the file in a model's folder
PRIOR = "methods.json"
# in the order of their complexity
LikenessMethodName = Literal["nearest_mean", "knn", "linear"]


class Prior(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The best methods, each with the smallest number of examples per label for which it is the best."""

    methods: dict[int, LikenessMethodName]

    def method(self, per_label: float, allowed: Collection[str]) -> LikenessMethodName:
        """Return the best allowed method for a number of examples per label; if none is listed, the nearest mean."""
        numbers = sorted((number for number in self.methods if number <= per_label), reverse=True)
        return next((self.methods[number] for number in numbers if self.methods[number] in allowed), "nearest_mean")

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"


NEAREST_MEAN = Prior({1: "nearest_mean"})


def load_prior(folder: Path) -> Prior:
    """Return the prior of a model folder. Raises `ConfigError` for an invalid file."""
    file = folder / PRIOR
    try:
        return msgspec.json.decode(file.read_bytes(), type=Prior)
    except FileNotFoundError:
        return NEAREST_MEAN
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file}: {error}") from None
