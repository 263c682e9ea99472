"""Run the paper's ablations at a small budget and print their table; the last line of the output is JSON.

`python -m training.ablations [NAME ...] --steps N` trains each ablation (an interrupted run resumes), exports the model
and scores the export on held-out images. Results are stored next to the runs, and finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from model.config import ConfigError
from model.folder import CheckpointError, load_folder
from model.prompt import PromptTokenizer
from model.zoo.default import prepare
from model.zoo.fetch import DefaultModelError
from training.ablations.ablation import BASE, Ablation, ablation_names, read_ablation
from training.ablations.clip import build_clip_model
from training.ablations.data import Kinds, draw_queries
from training.ablations.score import score
from training.ablations.small import build_small_model
from training.ablations.table import Result, format_table
from training.config import TrainConfig
from training.default.catalogue import Catalogue
from training.default_data.records import DEFAULT_FOLDER
from training.distributed import World
from training.sets import build_mixture, loss_factory
from training.trainer import Trainer, load_model, run

OUT = DEFAULT_FOLDER.parent / "ablations"
SEED = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    names: list[str]
    steps: int
    queries: int
    data: Path
    model: Path | None
    out: Path
    pretrain_steps: int
    threads: int


def run_config(ablation: Ablation, options: Options, model: Path, data: Path) -> TrainConfig:
    """Return the ablation's run with this command's paths and number of steps.

    A round-robin run has more steps, so that it sees each set as often as the base does.
    """
    config = ablation.config
    rounds = len(config.sets) if config.accumulate == "round_robin" else 1
    return replace(
        config,
        model=str(model),
        out=str(options.out / ablation.name),
        steps=options.steps * rounds,
        sets=tuple(replace(data_set, shards=str(data)) for data_set in config.sets),
    )


def run_ablation(ablation: Ablation, config: TrainConfig, kinds: Kinds, num_queries: int) -> Result:
    folder, out = Path(config.model), Path(config.out)
    model = load_model(config, folder)
    tokenizer = PromptTokenizer.load(folder, model.config.prompt)
    world = World()
    trainer = Trainer(
        config, model, build_mixture(config, model.config, tokenizer, world), world, loss_factory(config, tokenizer)
    )
    started = time.monotonic()
    run(trainer, folder / "tokenizer.json")
    seconds = time.monotonic() - started
    exported = load_folder(out / "model", "cpu", torch.float32)
    quality = score(exported, tokenizer, kinds, draw_queries(kinds, num_queries, SEED))
    return Result(ablation=ablation.name, steps=config.steps, seconds=seconds, **asdict(quality))


def run_ablations(options: Options) -> list[Result]:
    torch.set_num_threads(options.threads)
    base_kinds = Kinds(Catalogue(options.data))
    base_model = options.model or options.out / "small"
    if options.model is None:
        build_small_model(base_model, prepare(), base_kinds, options.pretrain_steps)
    results = []
    for name in options.names:
        ablation = read_ablation(name)
        model, data = model_and_data(ablation, options, base_model, base_kinds)
        config, file = run_config(ablation, options, model, data), options.out / f"{name}.json"
        result = _stored_result(file, config.steps)
        if result is None:
            result = run_ablation(ablation, config, Kinds(Catalogue(data)), options.queries)
            file.write_text(json.dumps(asdict(result)), encoding="utf-8")
        results.append(result)
    return results


def model_and_data(ablation: Ablation, options: Options, base_model: Path, kinds: Kinds) -> tuple[Path, Path]:
    """Return the folders of the experts and of the data with their encoder's features."""
    if ablation.encoder == "base":
        return base_model, options.data
    return build_clip_model(options.out / "clip-encoder", base_model, options.data, kinds, options.pretrain_steps)


def _stored_result(file: Path, steps: int) -> Result | None:
    if not file.exists():
        return None
    result = Result(**json.loads(file.read_text(encoding="utf-8")))
    return result if result.steps == steps else None


def parse(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="python -m training.ablations", description=__doc__)
    names = ablation_names()
    parser.add_argument("names", nargs="*", default=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--steps", type=int, default=300, help="training steps per run (default: 300)")
    parser.add_argument("--queries", type=int, default=200, help="scored queries per run (default: 200)")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="the folder of training.default_data")
    parser.add_argument(
        "--model", type=Path, help="a model folder whose experts are used (default: a small model is built)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of runs and results")
    parser.add_argument(
        "--pretrain-steps",
        type=int,
        default=300,
        help="steps of the small decoder on text, and of the CLIP encoder (default: 300)",
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    return Options(**vars(parser.parse_args(arguments)))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parse(sys.argv[1:])
    try:
        results = run_ablations(options)
    except (CheckpointError, ConfigError, DefaultModelError, OSError) as error:
        sys.exit(f"error: {error}")
    print(format_table(results, [read_ablation(result.ablation) for result in results], BASE), "\n")
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
