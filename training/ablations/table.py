"""The table of ablations: the change of the score in the paper and here (with its interval over seeds), compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from training.ablations.ablation import BASE, Ablation, ablation_names, read_ablation
from training.ablations.run import Scale, run_file, run_settings
from training.paired import SeedValues, Verdict, differences
from training.stored_runs import read_run

HEAD = (
    "ablation",
    "paper: overall (its base)",
    "paper: change",
    "accuracy, %",
    "change, points",
    "change of the loss",
    "sign",
    "step time / base's",
)
NUM_CANDIDATES = 8
# if the base is nearer to chance, changes are not meaningful
LEARNED = 3.0
# the largest change in points for which accuracy counts as flat
FLAT = 5.0


@dataclass(frozen=True, slots=True)
class Runs:
    """Finished runs by name and seed, the seeds that a table needs, and the ratios of step times by name."""

    results: Mapping[str, Mapping[int, Mapping[str, Any]]]
    seeds: tuple[int, ...]
    step_ratios: Mapping[str, float]

    def missing(self) -> list[str]:
        """Return the runs that the table lacks, by name and seed."""
        names = self.results
        return [f"{name}-{seed}" for seed in self.seeds for name in names if seed not in names[name]]

    def pairs(self, name: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Return the results of a row and of the base, for each seed that has both."""
        seeds = [seed for seed in self.seeds if seed in self.results[name] and seed in self.results[BASE]]
        return [(self.results[name][seed], self.results[BASE][seed]) for seed in seeds]

    def change(self, name: str) -> SeedValues | None:
        pairs = self.pairs(name)
        values = differences([accuracy(row) for row, _ in pairs], [accuracy(base) for _, base in pairs])
        return values if pairs else None

    def change_of_loss(self, name: str) -> SeedValues | None:
        pairs = self.pairs(name)
        return differences([row["loss"] for row, _ in pairs], [base["loss"] for _, base in pairs]) if pairs else None

    def late_gain(self) -> SeedValues | None:
        """Return how much the base gained in the last third of its steps; None if no run of it was scored before."""
        runs = [run for run in self.results[BASE].values() if run["progress"]]
        ends = [accuracy(run) for run in runs]
        return differences(ends, [accuracy(run["progress"][-1]) for run in runs]) if runs else None


def accuracy(result: Mapping[str, Any]) -> float:
    """Return the percentage of correct answers."""
    digits: str = result["correct"]
    return 100 * digits.count("1") / len(digits)


def read_runs(folder: Path, scale: Scale, seeds: Sequence[int], names: Sequence[str] | None = None) -> Runs:
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for name in dict.fromkeys([BASE, *(names or ablation_names())]):
        files = {seed: run_settings(read_ablation(name), scale, seed) for seed in seeds}
        stored = {seed: read_run(run_file(folder, name, seed), settings) for seed, settings in files.items()}
        results[name] = {seed: result for seed, result in stored.items() if result is not None}
    speed = read_run(folder / "speed.json") or {}
    return Runs(results, tuple(seeds), {name: row["ratio"] for name, row in speed.get("rows", {}).items()})


def verdict(ablation: Ablation, change: SeedValues | None) -> Verdict | str:
    """Return how the sign compares with the paper's, or what is missing; "" if the paper has no score."""
    if ablation.paper is None:
        return ""
    return "missing" if change is None else change.compare(ablation.paper.change)


def format_table(runs: Runs) -> str:
    """Return the table in Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(_row(read_ablation(name), runs)) + " |" for name in runs.results]
    return "\n".join(lines)


def _row(ablation: Ablation, runs: Runs) -> tuple[str, ...]:
    paper, results = ablation.paper, list(runs.results[ablation.name].values())
    is_base = ablation.name == BASE
    change = None if is_base else runs.change(ablation.name)
    loss = None if is_base else runs.change_of_loss(ablation.name)
    ratio = runs.step_ratios.get(ablation.name)
    return (
        ablation.description,
        f"{paper.overall:.1f} ({paper.base:.1f})" if paper else "",
        f"{paper.change:+.1f}" if paper else "",
        f"{fmean(map(accuracy, results)):.1f}" if results else "missing",
        change.text() if change else "",
        loss.text(3) if loss else "",
        "" if is_base else verdict(ablation, change),
        f"{ratio:.2f}" if ratio else "",
    )


def state_of_base(runs: Runs) -> Iterator[str]:
    """Yield whether the base has learned, and whether it still improves at the end."""
    results = list(runs.results[BASE].values())
    if not results:
        yield "The base has no finished run."
        return
    mean, chance = fmean(map(accuracy, results)), 100 / NUM_CANDIDATES
    limit = LEARNED * chance
    yield (
        f"The base has {mean:.1f}% at a chance of {chance:.1f}%: "
        f"{'at least' if mean >= limit else 'LESS than'} {LEARNED:g} times chance."
    )
    if gain := runs.late_gain():
        yield f"Its change in the last third of its steps is {gain.text()} points: {_flatness(gain)}."


def _flatness(gain: SeedValues) -> str:
    low, high = gain.interval()
    if max(-low, high) < FLAT:
        return f"flat within {FLAT:g} points"
    return "NOT flat, so that more steps are needed" if gain.sign() else "undecided whether it is flat"
