"""Train a bridge on shards, starting from the run's latest checkpoint.

`python -m training CONFIG.yaml` runs in one process; start several processes with torchrun.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from model.config import ConfigError
from model.folder import CheckpointError
from model.prompt import PromptTokenizer
from model.zoo.default import prepare
from model.zoo.fetch import DefaultModelError
from training.checkpoint import names_continuation
from training.config import TrainConfig, read_config
from training.data.shards import ShardError
from training.distributed import World, join, leave
from training.sets import build_mixture, loss_factory
from training.step import NonFiniteLoss
from training.trainer import Trainer, load_model, run

DIVERGED = (
    "The same command would repeat this: begin again in another `out`, with a smaller `optim.learning_rate` or more "
    "`optim.warmup_steps`"
)

log = logging.getLogger(__name__)


def train(config: TrainConfig, world: World, pause_file: Path | None = None) -> None:
    for warning in config.warnings() if world.is_first else ():
        log.warning("warning: %s", warning)
    folder = prepare() if config.model == "default" else Path(config.model).expanduser()
    model = load_model(config, folder)
    tokenizer = PromptTokenizer.load(folder, model.config.prompt)
    mixture = build_mixture(config, model, tokenizer, world)
    trainer = Trainer(config, model, mixture, world, loss_factory(config, tokenizer))
    run(trainer, folder / "tokenizer.json", pause_file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--pause-file", type=Path, help="pause between steps while this file exists")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    world = join()
    try:
        config = read_config(options.config)
        with names_continuation(Path(config.out)):
            train(config, world, options.pause_file)
    except NonFiniteLoss as error:
        sys.exit(f"error: {error}. {DIVERGED}")
    except (CheckpointError, ConfigError, DefaultModelError, OSError, ShardError) as error:
        sys.exit(f"error: {error}")
    leave(world)


if __name__ == "__main__":
    main()
