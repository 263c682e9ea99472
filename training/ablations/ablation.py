"""An ablation as data: `NAME.yaml` here holds what it changes of `base.yaml`, which is a run like any other.

run       keys of `TrainConfig` that replace the base's
without   names of the base's sets that are left out
paper     its overall score in the paper, and the score that the paper's own base has in the same table
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from model.config import ConfigError, from_dict
from training.config import TrainConfig, parse_config

FOLDER = Path(__file__).parent
BASE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    overall: float
    base: float

    @property
    def change(self) -> float:
        return self.overall - self.base


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    name: str
    says: str
    config: TrainConfig
    paper: Paper | None


def names() -> list[str]:
    """The base first, the others in the alphabet's order."""
    return [BASE, *sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != BASE)]


def read_ablation(name: str) -> Ablation:
    base = _read(FOLDER / f"{BASE}.yaml")
    if name == BASE:
        return Ablation(name=name, says="the base", config=parse_config(base), paper=None)
    if name not in names():
        raise ConfigError(f"{name!r} is no ablation: there are {', '.join(names())}")
    values = _read(FOLDER / f"{name}.yaml")
    if unknown := sorted(values.keys() - {"says", "run", "without", "paper"}):
        raise ConfigError(f"{name}.yaml: unknown key {', '.join(unknown)}")
    config = parse_config({**base, **values.get("run", {})})
    paper = from_dict(Paper, values["paper"], f"{name}.yaml: paper") if "paper" in values else None
    left = _without(config, values.get("without", []), name)
    return Ablation(name=name, says=values["says"], config=left, paper=paper)


def _without(config: TrainConfig, left_out: list[str], name: str) -> TrainConfig:
    if unknown := sorted(set(left_out) - {one.name for one in config.sets}):
        raise ConfigError(f"{name}.yaml: the base has no set {', '.join(unknown)}")
    return replace(config, sets=tuple(one for one in config.sets if one.name not in left_out))


def _read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return values
