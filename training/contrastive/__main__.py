"""Train a vision encoder contrastively with texts, starting from the run's latest checkpoint.

`python -m training.contrastive CONFIG.yaml` runs in one process: the loss needs the whole batch, and distributing it is
not implemented.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from model.config import ConfigError
from model.folder import CheckpointError
from training.checkpoint import names_continuation
from training.contrastive.config import read_config
from training.contrastive.trainer import SUFFIX, ContrastiveTrainer
from training.data.shards import ShardError
from training.precision import describe_precision
from training.progress import ProgressReporter
from training.run_lock import only_run
from training.step import NonFiniteLoss
from training.stop import Stopped, stop_signal

log = logging.getLogger(__name__)


def train(trainer: ContrastiveTrainer) -> Path:
    """Train to the end of the run and return the encoder's folder."""
    with only_run(trainer.out):
        _train(trainer)
        folder = trainer.export()
    log.info("the encoder is in %s; set `vision` of a run to this folder", folder)
    if trainer.held_out:
        to_text, to_image = trainer.recall(trainer.held_out)
        print(f"recall at 1 on held-out pairs: image to text {to_text:.3f}, text to image {to_image:.3f}")
    return folder


def _train(trainer: ContrastiveTrainer) -> None:
    config, out = trainer.config, trainer.out
    num_steps_done = trainer.resume()
    log.info("%s", describe_precision(config.precision, trainer.device))
    with stop_signal() as stop, ProgressReporter(out, config.steps, num_steps_done, enabled=True) as progress:
        for report in trainer.steps():
            progress.report_step(report)
            if trainer.num_steps_done % config.log_steps == 0:
                with (out / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**asdict(report), "scale": float(trainer.towers.scale.detach())}) + "\n")
            is_due = trainer.num_steps_done % config.checkpoint_steps == 0 or trainer.num_steps_done == config.steps
            if is_due or stop.number:
                trainer.save()
            if stop.number:
                break
    if stop.number:
        raise Stopped(stop.number)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.contrastive", description=__doc__)
    parser.add_argument("config", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if dist.is_torchelastic_launched():
        sys.exit("error: contrastive training runs in one process and cannot be started by torchrun")
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = read_config(options.config)
        with names_continuation(Path(config.out), SUFFIX):
            train(ContrastiveTrainer(config, device))
    except (CheckpointError, ConfigError, NonFiniteLoss, OSError, ShardError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
