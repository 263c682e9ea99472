"""Measures the time of a step of each ablation relative to the base: the two runs alternate, one step each.

The time is CPU time over all threads. Other programs on the machine affect it less than wall time, and affect both steps of
a pair in the same way. The ratio is the median over the pairs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from training.ablations.ablation import BASE, Ablation
from training.ablations.run import build_trainer
from training.config import TrainConfig
from training.step import StepReport

WARM_UP = 3


def compare_steps(ablation: Ablation, config: TrainConfig, base: TrainConfig, pairs: int) -> dict[str, Any]:
    """Return the median seconds per step of both runs, and the median and the quartiles of their ratio.

    Two steps of a round-robin run, one of each set, are compared with one step of the base.
    """
    trainer, base_trainer = build_trainer(config)[0], build_trainer(base)[0]
    rounds = len(config.sets) if config.accumulate == "round_robin" else 1
    steps, base_steps = trainer.steps(), base_trainer.steps()
    times = []
    for _ in range(WARM_UP + pairs):
        ours = sum(_processor_seconds(steps) for _ in range(rounds))
        times.append((ours, _processor_seconds(base_steps)))
    times = times[WARM_UP:]
    ratios = [ours / theirs for ours, theirs in times]
    low, _, high = quantiles(ratios, n=4)
    return {
        "ablation": ablation.name,
        "seconds": round(median(ours for ours, _ in times), 4),
        "base_seconds": round(median(theirs for _, theirs in times), 4),
        "ratio": round(median(ratios), 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "pairs": pairs,
    }


def _processor_seconds(steps: Iterator[StepReport]) -> float:
    started = time.process_time()
    next(steps)
    return time.process_time() - started


def speed_settings(pairs: int) -> dict[str, Any]:
    return {"pairs": pairs, "base": BASE}


def speed_file(runs: Path) -> Path:
    return runs / "speed.json"
