"""`python -m training.ablations [NAME ...] --steps N`: the paper's ablations at a small budget, and their table.

Each is a whole run (resumed if it was stopped), exported, read back, and asked about unseen images. Results are kept beside
the runs; the last line is JSON.
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

from model.checkpoint.errors import CheckpointError
from model.checkpoint.native import load_folder
from model.config import ConfigError
from model.tokenizer import PromptTokenizer
from model.zoo.default import DefaultModelError, prepare
from training.ablations.ablation import BASE, Ablation, names, read_ablation
from training.ablations.data import Kinds, queries
from training.ablations.score import score
from training.ablations.small import make_small
from training.ablations.table import Result, table
from training.config import TrainConfig
from training.default.catalogue import Catalogue
from training.distributed import World
from training.sets import loss_of, make_mixture
from training.trainer import Trainer, load_model, run

CACHE = Path.home() / ".cache" / "flamboyance"
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


def placed(ablation: Ablation, options: Options, model: Path) -> TrainConfig:
    """The ablation's run at this command's places and length. A run by turns sees each set as often as the base does."""
    config = ablation.config
    turns = len(config.sets) if config.accumulate == "round_robin" else 1
    return replace(
        config,
        model=str(model),
        out=str(options.out / ablation.name),
        steps=options.steps * turns,
        sets=tuple(replace(one, shards=str(options.data)) for one in config.sets),
    )


def measured(ablation: Ablation, config: TrainConfig, kinds: Kinds, num_queries: int) -> Result:
    folder, out = Path(config.model), Path(config.out)
    model = load_model(config, folder)
    tokenizer = PromptTokenizer.load(folder, model.config.prompt)
    world = World()
    trainer = Trainer(
        config, model, make_mixture(config, model.config, tokenizer, world), world, loss_of(config, tokenizer)
    )
    began = time.monotonic()
    run(trainer, folder / "tokenizer.json")
    seconds = time.monotonic() - began
    found = score(load_folder(out / "model", "cpu", torch.float32), tokenizer, kinds, queries(kinds, num_queries, SEED))
    return Result(ablation=ablation.name, steps=config.steps, seconds=seconds, **asdict(found))


def measure(options: Options) -> list[Result]:
    torch.set_num_threads(options.threads)
    kinds = Kinds(Catalogue(options.data))
    model = options.model or options.out / "small"
    if options.model is None:
        make_small(model, prepare(), kinds, options.pretrain_steps)
    results = []
    for name in options.names:
        ablation = read_ablation(name)
        config, file = placed(ablation, options, model), options.out / f"{name}.json"
        found = _kept(file, config.steps)
        if found is None:
            found = measured(ablation, config, kinds, options.queries)
            file.write_text(json.dumps(asdict(found)), encoding="utf-8")
        results.append(found)
    return results


def _kept(file: Path, steps: int) -> Result | None:
    if not file.exists():
        return None
    result = Result(**json.loads(file.read_text(encoding="utf-8")))
    return result if result.steps == steps else None


def parse(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="python -m training.ablations", description=__doc__)
    parser.add_argument("names", nargs="*", default=names(), metavar="NAME", help=f"of {', '.join(names())}")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--data", type=Path, default=CACHE / "default-data", help="what training.default_data made")
    parser.add_argument(
        "--model", type=Path, help="a model folder whose experts to take (default: a small one is made)"
    )
    parser.add_argument("--out", type=Path, default=CACHE / "ablations", help="where runs and results are kept")
    parser.add_argument("--pretrain-steps", type=int, default=300, help="of the small model's decoder, on text")
    parser.add_argument("--threads", type=int, default=1)
    return Options(**vars(parser.parse_args(arguments)))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parse(sys.argv[1:])
    try:
        results = measure(options)
    except (CheckpointError, ConfigError, DefaultModelError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(results, [read_ablation(result.ablation) for result in results], BASE), "\n")
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
