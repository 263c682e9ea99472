"""Run the paper's ablations at a small budget and print their table.

`python -m training.ablations [NAME ...]` trains the missing runs, seed by seed: each ablation is trained and exported, and
the export is scored on held-out images. A finished run is a file in `training/ablations/runs` and is not repeated; an
interrupted run resumes. `--report` only prints the table of finished runs, and `--speed` measures the time of steps.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import ConfigError
from model.folder import CheckpointError
from model.zoo.default import prepare
from model.zoo.fetch import DefaultModelError
from training.ablations.ablation import BASE, Ablation, ablation_names, read_ablation
from training.ablations.clip import build_clip_model
from training.ablations.data import Kinds
from training.ablations.run import RUNS, Scale, run_ablation, run_config, run_file, run_settings
from training.ablations.small import build_small_model
from training.ablations.speed import compare_steps, speed_file, speed_settings
from training.ablations.table import Runs, format_table, read_runs, state_of_base
from training.default.catalogue import Catalogue
from training.default_data.records import DEFAULT_FOLDER
from training.stop import exit_status
from training.stored_runs import read_run, working_folder, write_run

log = logging.getLogger(__name__)
OUT = DEFAULT_FOLDER.parent / "ablations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    names: list[str]
    seeds: list[int]
    scale: Scale
    data: Path
    model: Path | None
    out: Path
    runs: Path
    threads: int
    pairs: int


class Experts:
    """The folders of the experts, and of the data with the features of their encoder; both are built on first use."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._kinds = Kinds(Catalogue(options.data))
        self._model = options.model or options.out / f"small-{options.scale.pretrain_steps}"

    def folders(self, ablation: Ablation) -> tuple[Path, Path]:
        """Return the folders of the model and of the data for a run."""
        options, steps = self._options, self._options.scale.pretrain_steps
        if options.model is None:
            build_small_model(self._model, prepare(), self._kinds, steps)
        if ablation.encoder == "base":
            return self._model, options.data
        return build_clip_model(options.out / f"clip-{steps}", self._model, options.data, self._kinds, steps)


def missing_runs(options: Options) -> Iterator[tuple[Ablation, int]]:
    """Yield the runs without a file, seed by seed; a run that another process has finished meanwhile is skipped."""
    for seed in options.seeds:
        for ablation in map(read_ablation, options.names):
            settings = run_settings(ablation, options.scale, seed)
            if read_run(run_file(options.runs, ablation.name, seed), settings) is None:
                yield ablation, seed


def run_missing(options: Options) -> None:
    experts = None
    for ablation, seed in missing_runs(options):
        experts = experts or Experts(options)
        model, data = experts.folders(ablation)
        settings = run_settings(ablation, options.scale, seed)
        folder = working_folder(options.out, f"{ablation.name}-{seed}", settings)
        config = run_config(ablation, options.scale, seed, model, data, folder)
        result = run_ablation(ablation, config, Kinds(Catalogue(data)), options.scale)
        write_run(run_file(options.runs, ablation.name, seed), settings, result)
        log.info("finished %s, seed %d", ablation.name, seed)


def measure_speed(options: Options) -> None:
    """Measure the step time of each ablation relative to the base, and add the ratios to one file."""
    experts, file, settings = Experts(options), speed_file(options.runs), speed_settings(options.pairs)
    rows = (read_run(file, settings) or {"rows": {}})["rows"]
    base = run_config(read_ablation(BASE), options.scale, 0, *experts.folders(read_ablation(BASE)), options.out)
    for ablation in map(read_ablation, options.names):
        config = run_config(ablation, options.scale, 0, *experts.folders(ablation), options.out)
        rows[ablation.name] = compare_steps(ablation, config, base, options.pairs)
        write_run(file, settings, {"rows": rows})


def report(runs: Runs) -> None:
    print(format_table(runs), "\n")
    for sentence in state_of_base(runs):
        print(sentence)
    if missing := runs.missing():
        print(f"Missing: {', '.join(missing)}.")


def parse(arguments: list[str]) -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m training.ablations", description=__doc__)
    names, scale = ablation_names(), Scale()
    parser.add_argument("names", nargs="*", default=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=scale.steps, help=f"steps per run (default: {scale.steps})")
    parser.add_argument(
        "--queries", type=int, default=scale.queries, help=f"queries per run (default: {scale.queries})"
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="the folder of training.default_data")
    parser.add_argument("--model", type=Path, help="model folder whose experts are used (default: build a small model)")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of models, logs and checkpoints")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the folder of finished runs")
    parser.add_argument(
        "--pretrain-steps",
        type=int,
        default=scale.pretrain_steps,
        help=f"pretraining steps of the small decoder, and of the CLIP encoder (default: {scale.pretrain_steps})",
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--report", action="store_true", help="print the table of the finished runs without training")
    parser.add_argument("--speed", action="store_true", help="measure the time of steps instead of training")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of steps for --speed (default: 16)")
    values = parser.parse_args(arguments)
    options = Options(
        names=values.names,
        seeds=values.seeds,
        scale=Scale(steps=values.steps, queries=values.queries, pretrain_steps=values.pretrain_steps),
        data=values.data,
        model=values.model,
        out=values.out,
        runs=values.runs,
        threads=values.threads,
        pairs=values.pairs,
    )
    return options, values


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options, values = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    try:
        if values.speed:
            measure_speed(options)
        elif not values.report:
            run_missing(options)
        report(read_runs(options.runs, options.scale, options.seeds, options.names))
    except KeyboardInterrupt as interrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        sys.exit(exit_status(interrupt))
    except (CheckpointError, ConfigError, DefaultModelError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
