"""Reads the finished runs from which the page is written, and returns their results by seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.ablations.ablation import BASE
from training.ablations.run import RUNS as ABLATION_RUNS
from training.ablations.run import Scale as AblationScale
from training.ablations.speed import speed_file
from training.ablations.table import Runs, read_runs
from training.few_shot.run import RUNS as FEW_SHOT_RUNS
from training.few_shot.run import SUBJECTS, Results, read_results
from training.paired import SeedValues
from training.stored_runs import read_run

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2)
LAST, ALL_PREVIOUS, CLIPS = "images", "images-all-previous", "clips"


@dataclass(frozen=True, slots=True)
class Evidence:
    """All finished runs; `speed`, `cost` and `shots` are empty if they were not measured.

    `shots` has the default model's answers by number of shots, one digit per query.
    """

    ablations: Runs
    few_shot: Results
    speed: Mapping[str, Any]
    cost: Mapping[str, Any]
    shots: Mapping[str, str]
    published: Mapping[str, Any]

    def missing(self) -> list[str]:
        """Return the missing measurements, each as the command that measures it."""
        missing = [f"`python -m training.ablations`: {name}" for name in self.ablations.missing()]
        missing += [
            f"`python -m training.few_shot`: {name}-{seed}"
            for name, runs in self.few_shot.items()
            for seed in SEEDS
            if seed not in runs
        ]
        missing += [] if self.speed else ["`python -m training.ablations --speed`"]
        missing += [] if self.cost else ["`python -m evaluation.paper.cost`"]
        return missing + ([] if self.shots else ["`python -m evaluation.paper.shots`"])

    def shares(self, name: str, *keys: str) -> dict[int, float]:
        """Return the percentage of correct answers of a few-shot subject by seed."""
        shares = {}
        for seed, run in self.few_shot[name].items():
            digits: Any = run["correct"]
            for key in keys:
                digits = digits[key]
            shares[seed] = 100 * digits.count("1") / len(digits)
        return shares

    def gates(self, name: str) -> dict[int, Mapping[str, Any]]:
        """Return the gates over training by seed, of the ablations' base or a few-shot subject."""
        runs = self.ablations.results[BASE] if name == BASE else self.few_shot[name]
        return {seed: run["gates"] for seed, run in runs.items() if run["gates"]}


def read_evidence(
    ablations: Path = ABLATION_RUNS, few_shot: Path = FEW_SHOT_RUNS, measured: Path = FOLDER / "runs"
) -> Evidence:
    return Evidence(
        ablations=read_runs(ablations, AblationScale(), SEEDS),
        few_shot=read_results(few_shot, SEEDS, {name: subject.scale for name, subject in SUBJECTS.items()}),
        speed=(read_run(speed_file(ablations)) or {}).get("rows", {}),
        cost=(read_run(measured / "cost.json") or {}).get("sizes", {}),
        shots=(read_run(measured / "shots.json") or {}).get("correct", {}),
        published=yaml.safe_load((FOLDER / "published.yaml").read_text(encoding="utf-8")),
    )


def values(shares: Mapping[int, float]) -> SeedValues | None:
    """Return percentages by seed as the values of the seeds; None if there are none."""
    return SeedValues(tuple(shares.values()), bounds=(0.0, 100.0)) if shares else None


def change(shares: Mapping[int, float], base: Mapping[int, float] | float) -> SeedValues | None:
    """Return the differences of the seeds that both have; None if there is no such seed."""
    seeds = [seed for seed in shares if isinstance(base, float) or seed in base]
    pairs = [(shares[seed], base if isinstance(base, float) else base[seed]) for seed in seeds]
    return SeedValues(tuple(value - other for value, other in pairs)) if pairs else None
