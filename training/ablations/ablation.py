"""An ablation is data: `NAME.yaml` in this folder holds its changes to `base.yaml`, which is itself a run.

says      the description that the table shows
run       keys of `TrainConfig` that replace the base's
without   names of the base's sets that are removed
encoder   `clip`: the runs' model and data have the encoder of `training/ablations/clip.py` instead of the base's
paper     the overall score in the paper, and the score of the paper's base in the same table

The paper has two versions with different scores. All files quote the later one, whose base is 70.7; an ablation that the
later version does not list has no score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from model.config import ConfigError, from_dict
from training.config import TrainConfig, parse_config

FOLDER = Path(__file__).parent
BASE = "base"
Encoder = Literal["base", "clip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperScore:
    overall: float
    base: float

    @property
    def change(self) -> float:
        return self.overall - self.base


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    name: str
    description: str
    config: TrainConfig
    encoder: Encoder = "base"
    paper: PaperScore | None = None


def ablation_names() -> list[str]:
    """Return the base first, then the ablations in alphabetical order."""
    return [BASE, *sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != BASE)]


def read_ablation(name: str) -> Ablation:
    base = _read(FOLDER / f"{BASE}.yaml")
    if name == BASE:
        return Ablation(name=name, description="base", config=parse_config(base))
    if name not in ablation_names():
        raise ConfigError(f"{name!r} is not an ablation, must be one of {', '.join(ablation_names())}")
    values = _read(FOLDER / f"{name}.yaml")
    if unknown := sorted(values.keys() - {"says", "run", "without", "encoder", "paper"}):
        raise ConfigError(f"{name}.yaml: unknown key {', '.join(unknown)}")
    config = parse_config({**base, **values.get("run", {})})
    paper = from_dict(PaperScore, values["paper"], f"{name}.yaml: paper") if "paper" in values else None
    config = _without_sets(config, values.get("without", []), name)
    encoder = values.get("encoder", "base")
    if encoder not in get_args(Encoder):
        raise ConfigError(f"{name}.yaml: encoder is {encoder!r}, must be one of {', '.join(get_args(Encoder))}")
    return Ablation(name=name, description=values["says"], config=config, encoder=encoder, paper=paper)


def _without_sets(config: TrainConfig, removed: list[str], name: str) -> TrainConfig:
    if unknown := sorted(set(removed) - {data_set.name for data_set in config.sets}):
        raise ConfigError(f"{name}.yaml: without: the base has no set {', '.join(unknown)}")
    return replace(config, sets=tuple(data_set for data_set in config.sets if data_set.name not in removed))


def _read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return values
