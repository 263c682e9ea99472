"""One run of an ablation: it trains, exports, loads the export and scores it, and its result is a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from model.folder import load_folder
from model.prompt import PromptTokenizer
from training.ablations.ablation import BASE, Ablation
from training.ablations.data import NUM_KINDS, SHOTS, Kinds, draw_queries
from training.ablations.score import score
from training.config import TrainConfig
from training.default_data.features import feature_file
from training.distributed import World
from training.sets import build_mixture, loss_factory
from training.step import StepReport
from training.stored_runs import config_settings
from training.trainer import Trainer, load_model, run

RUNS = Path(__file__).parent / "runs"
QUERY_SEED = 17
# the base is also scored after these shares of its steps, to see whether it has stopped improving
CHECKED_SHARES = (1 / 3, 2 / 3)
GATE_LINES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The size of all runs of a table."""

    steps: int = 240
    queries: int = 256
    pretrain_steps: int = 300


def run_file(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name}-{seed}.json"


def run_config(ablation: Ablation, scale: Scale, seed: int, model: Path, data: Path, out: Path) -> TrainConfig:
    """Return the ablation's run with these paths, number of steps and seed.

    A round-robin run has more steps, so that it sees each set as often as the base does.
    """
    config = ablation.config
    rounds = len(config.sets) if config.accumulate == "round_robin" else 1
    return replace(
        config,
        model=str(model),
        out=str(out),
        steps=scale.steps * rounds,
        seed=seed,
        sets=tuple(replace(data_set, shards=str(data)) for data_set in config.sets),
    )


def run_settings(ablation: Ablation, scale: Scale, seed: int) -> dict[str, Any]:
    """Return everything that determines the result of a run, without the paths of this machine."""
    config = run_config(ablation, scale, seed, Path(), Path(), Path())
    return {
        "ablation": ablation.name,
        "encoder": ablation.encoder,
        **asdict(scale),
        "kinds": NUM_KINDS,
        "shots": SHOTS,
        "config": config_settings(config),
    }


def build_trainer(config: TrainConfig) -> tuple[Trainer, PromptTokenizer]:
    folder = Path(config.model)
    model = load_model(config, folder)
    tokenizer = PromptTokenizer.load(folder, model.config.prompt)
    world = World()
    mixture = build_mixture(config, model, tokenizer, world)
    return Trainer(config, model, mixture, world, loss_factory(config, tokenizer)), tokenizer


def run_ablation(ablation: Ablation, config: TrainConfig, kinds: Kinds, scale: Scale) -> dict[str, Any]:
    """Return the result of a run; one that was interrupted continues from its checkpoint."""
    trainer, tokenizer = build_trainer(config)
    queries = draw_queries(kinds, scale.queries, QUERY_SEED + config.seed)
    shares = CHECKED_SHARES if ablation.name == BASE else ()
    checked_steps = {round(share * config.steps) for share in shares}
    seconds: list[float] = []
    progress: list[dict[str, Any]] = []

    def observe(report: StepReport) -> None:
        seconds.append(report.seconds)
        if report.step + 1 in checked_steps:
            part = score(trainer.model, tokenizer, kinds, queries)
            progress.append({"step": report.step + 1, "correct": part.digits, "loss": round(part.loss, 4)})

    run(trainer, Path(config.model) / "tokenizer.json", observe=observe)
    exported = load_folder(Path(config.out) / "model", "cpu", torch.float32)
    final = score(exported, tokenizer, kinds, queries)
    return {
        "steps": config.steps,
        "correct": final.digits,
        "loss": round(final.loss, 4),
        "progress": progress,
        "seconds_per_step": round(median(seconds), 4) if seconds else None,
        "gates": read_gates(Path(config.out) / "log.jsonl"),
        "data": feature_file(Path(), kinds.catalogue.records).stem,
    }


def read_gates(log: Path) -> dict[str, Any]:
    """Return |tanh| of each gate at up to `GATE_LINES` steps of a run's log; nothing for a bridge without gates.

    A resumed run repeats steps; the last line of each step is used.
    """
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    lines = {line["step"]: line for line in map(json.loads, text.splitlines())}
    steps = thin(sorted(lines), GATE_LINES)
    names = lines[steps[0]]["gates"] if steps else ()
    values = {name: [round(lines[step]["gates"][name], 4) for step in steps] for name in names}
    return {"steps": [step + 1 for step in steps], "values": values} if values else {}


def thin(steps: Sequence[int], count: int) -> list[int]:
    """Return up to `count` of the steps at equal distances, including the last one."""
    stride = max(1, -(-len(steps) // count))
    return list(steps[::-1][::stride][::-1])
