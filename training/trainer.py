"""A run from start or checkpoint to its end: step, show, save; the frozen weights' digest before and after.

Whoever makes the mixture decides what is learned: shards on disk (`python -m training`) or the default model's episodes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from model.checkpoint.native import load_folder
from model.checkpoint.vision_folder import load_vision_folder
from model.flamingo import Flamingo
from training.bridge import BridgeLoss, freeze, frozen_digest
from training.checkpoint import export, latest, load, save, tensors_of
from training.config import TrainConfig
from training.distributed import World, checkpoint_activations, shard
from training.mixture import Mixture
from training.progress import Watch, gate_values
from training.start import (
    at_resolution,
    with_ablated_bridge,
    with_discriminants,
    with_free_weights,
    with_new_language_model,
    with_vision,
)
from training.step import Stepper, StepReport

log = logging.getLogger(__name__)
PAUSE_SECONDS = 2.0


class FrozenWeightsMoved(RuntimeError):
    """An expert's weights are not those that the run began with."""


class Trainer:
    """`make_loss` is called on the model as it will be trained: moved, cast and frozen."""

    def __init__(
        self,
        config: TrainConfig,
        model: Flamingo,
        mixture: Mixture,
        world: World,
        make_loss: Callable[[Flamingo], BridgeLoss] = BridgeLoss,
    ) -> None:
        self.config = config
        self.out = Path(config.out).expanduser()
        self.model = model
        self.world = world
        dtype = getattr(torch, config.precision)
        freeze(model.to(world.device), dtype, config.trains)
        loss = make_loss(model)
        if config.activation_checkpointing:
            checkpoint_activations(loss)
        self.digest = frozen_digest(model, config.trains)
        if world.size > 1:
            shard(loss, dtype)
        self.stepper = Stepper(config, loss, mixture, world)
        self.done = 0

    def resume(self) -> int:
        """Goes on from the latest checkpoint if there is one; gives the number of steps done."""
        if (place := latest(self.out / "checkpoints")) is not None:
            positions = load(place, tensors_of(self.stepper.named, self.stepper.optimizers), self.world)
            self.stepper.mixture.load_state(positions["streams"])
            self.done = positions["step"]
            log.info("going on from %s", place)
        return self.done

    def steps(self) -> Iterator[StepReport]:
        while self.done < self.config.steps:
            report = self.stepper.step(self.done)
            self.done += 1
            yield report

    def save(self) -> Path:
        tensors = tensors_of(self.stepper.named, self.stepper.optimizers)
        return save(self.out / "checkpoints", self.done, tensors, self.stepper.mixture.state(), self.world)

    def check_frozen(self) -> None:
        if (found := frozen_digest(self.model, self.config.trains)) != self.digest:
            raise FrozenWeightsMoved(f"the frozen weights' digest was {self.digest}, and is {found}")


def run(trainer: Trainer, tokenizer_json: Path, pause_file: Path | None = None) -> None:
    """To the end of the run, and the served folder `out/model` behind it."""
    config, out, first = trainer.config, trainer.out, trainer.world.is_first
    done = trainer.resume()
    with Watch(out, config.steps, done, shown=first) as watch:
        for report in trainer.steps():
            watch.step(report)
            if trainer.done % config.log_steps == 0:
                watch.gates(trainer.model, report.step)
                _log(out, report, trainer, first)
            if trainer.done % config.checkpoint_steps == 0 or trainer.done == config.steps:
                trainer.save()
            _wait_while_paused(pause_file)
    trainer.check_frozen()
    export(trainer.model, tokenizer_json, out / "model", trainer.world)
    log.info("frozen weights unchanged (sha256 %s); %s is ready to be served", trainer.digest[:12], out / "model")


def _log(out: Path, report: StepReport, trainer: Trainer, first: bool) -> None:
    """A line of JSON every few steps: what the model card's curves are drawn from."""
    gates = gate_values(trainer.model)
    if first:
        line = {**asdict(report), "gates": gates, "time": time.time()}
        with (out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _wait_while_paused(pause_file: Path | None) -> None:
    while pause_file is not None and pause_file.exists():
        time.sleep(PAUSE_SECONDS)


def load_model(config: TrainConfig, folder: Path) -> Flamingo:
    """On the CPU in float32: the trainer moves and casts."""
    model = load_folder(folder, "cpu", torch.float32)
    if config.vision:
        model = with_vision(model, load_vision_folder(Path(config.vision).expanduser()))
    if config.image_size:
        model = at_resolution(model, config.image_size)
    if "language_model" in config.trains:
        model = with_free_weights(model)
    if config.language_model == "scratch":
        model = with_new_language_model(model, config.seed)
    if config.bridge == "start":
        model = with_ablated_bridge(model, config.ablate)
    if config.discriminants:
        model = with_discriminants(model, Path(config.discriminants).expanduser())
    return model
