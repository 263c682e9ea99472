"""Train small bridges on sequences of five images or videos, and print their accuracy; the last line is JSON.

`python -m training.few_shot [NAME ...]` trains the missing runs, seed by seed. `images` is trained on words that are new in
each sequence, and evaluated with up to 32 shots of held-out labels. `images-all-previous` is the same, but text reads all
previous images. `clips` is trained on 8 frames and evaluated on 30. A finished run is a file in `training/few_shot/runs`.
`--report` only prints the finished runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from model.config import ConfigError
from model.folder import CheckpointError
from model.zoo.fetch import DefaultModelError
from training.default_data.records import DEFAULT_FOLDER
from training.few_shot.run import RUNS, SUBJECTS, Results, Scale, read_results, run_file, run_settings, run_subject
from training.stop import exit_status
from training.stored_runs import read_run, write_run

log = logging.getLogger(__name__)
OUT = DEFAULT_FOLDER.parent / "few-shot"


def run_missing(options: argparse.Namespace) -> None:
    for seed in options.seeds:
        for name in options.names:
            scale = scale_of(name, options)
            settings, file = run_settings(SUBJECTS[name], scale, seed), run_file(options.runs, name, seed)
            if read_run(file, settings) is None:
                experts = options.out / f"experts-{scale.pretrain_steps}"
                write_run(file, settings, run_subject(name, scale, seed, options.data, experts, options.out))
                log.info("finished %s, seed %d", name, seed)


def scale_of(name: str, options: argparse.Namespace) -> Scale:
    """Return the subject's scale, changed by the options of the command line."""
    changes = {field: getattr(options, field) for field in ("steps", "queries", "pretrain_steps")}
    return replace(SUBJECTS[name].scale, **{field: value for field, value in changes.items() if value is not None})


def format_results(results: Results) -> Iterator[str]:
    """Yield a line for each row of each run, with the percentage of correct answers per column."""
    for name, runs in results.items():
        for seed, run in runs.items():
            rows = run["correct"]
            table = rows if isinstance(next(iter(rows.values())), dict) else {"held-out labels": rows}
            for row, answers in table.items():
                cells = [f"{column}: {100 * digits.count('1') / len(digits):.1f}" for column, digits in answers.items()]
                yield f"{name}, seed {seed}, {row}: {'; '.join(cells)}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.few_shot", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SUBJECTS), metavar="NAME", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--steps", type=int, help="steps per run (default: as in training/few_shot/run.py)")
    parser.add_argument("--queries", type=int, help="queries per run for each number of shots")
    parser.add_argument("--pretrain-steps", type=int, help="pretraining steps of the small decoder on text")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="the folder of training.default_data")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of models, logs and checkpoints")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the folder of finished runs")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--report", action="store_true", help="print the finished runs without training")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(SUBJECTS)):
        parser.error(f"{', '.join(unknown)}: must be one of {', '.join(SUBJECTS)}")
    return options


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    try:
        if not options.report:
            run_missing(options)
    except KeyboardInterrupt as interrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        sys.exit(exit_status(interrupt))
    except (CheckpointError, ConfigError, DefaultModelError, OSError) as error:
        sys.exit(f"error: {error}")
    scales = {name: scale_of(name, options) for name in options.names}
    results = read_results(options.runs, options.seeds, scales)
    print("\n".join(format_results(results)))
    print(json.dumps({name: {str(seed): run for seed, run in runs.items()} for name, runs in results.items()}))


if __name__ == "__main__":
    main()
