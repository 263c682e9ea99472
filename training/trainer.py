"""Runs training from the start or the latest checkpoint to the end: steps, reports, saves, and checks the frozen weights.

The mixture decides the training data: shards on disk or generated sets such as the default model's episodes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from model.flamingo import Flamingo
from model.folder import load_folder, load_vision_folder
from model.hub.job import SOURCE, Origin, read_origin
from model.likeness import LIKENESS
from model.prior import PRIOR
from training.bridge import BridgeLoss, freeze, frozen_digest
from training.checkpoint import collect_tensors, export, latest, load, load_positions, load_settings, names_damage, save
from training.config import TrainConfig
from training.distributed import World, checkpoint_activations, shard
from training.mixture import Mixture
from training.precision import describe_precision, with_precision
from training.progress import ProgressReporter, gate_values
from training.resumed import check_steps, check_unchanged, resumed_settings
from training.run_lock import only_run
from training.start import (
    at_resolution,
    with_ablated_bridge,
    with_added_kin,
    with_discriminants,
    with_free_weights,
    with_kin,
    with_new_language_model,
    with_scaled_frames,
    with_vision,
)
from training.step import Stepper, StepReport, check_finite_weights
from training.stop import Stopped, StopSignal, stop_signal

log = logging.getLogger(__name__)
PAUSE_SECONDS = 2.0
NO_GRADIENT = (
    "only weight decay changes weights. An encoder gets no gradient through closed gates: train the bridge too"
)


class FrozenWeightsChanged(RuntimeError):
    """A frozen weight differs from its value at the start of the run."""


class Trainer:
    """A run's state and steps; `make_loss` receives the model on its device, with frozen parts cast and frozen."""

    def __init__(
        self,
        config: TrainConfig,
        model: Flamingo,
        mixture: Mixture,
        world: World,
        make_loss: Callable[[Flamingo], BridgeLoss],
    ) -> None:
        self.out = Path(config.out).expanduser()
        self.config = config = with_precision(config, world, load_settings(self.out / "checkpoints"))
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
        self.settings = resumed_settings(config)
        self.num_steps_done = 0

    def resume(self) -> int:
        """Continue from the latest checkpoint, if one exists, and return the number of steps done.

        Raises `ConfigError` if it is of a run with other settings, or of more steps than the run is to have.
        """
        if (checkpoint := latest(self.out / "checkpoints")) is not None:
            positions = load_positions(checkpoint)
            check_unchanged(checkpoint, positions.get("settings"), self.settings)
            check_steps(checkpoint, positions["step"], self.config.steps)
            tensors = collect_tensors(self.stepper.named_parameters, self.stepper.optimizers)
            load(checkpoint, tensors, self.world)
            with names_damage(checkpoint):
                self.stepper.mixture.load_state(positions["streams"])
            self.num_steps_done = positions["step"]
            log.info("resuming from %s", checkpoint)
        return self.num_steps_done

    def steps(self) -> Iterator[StepReport]:
        while self.num_steps_done < self.config.steps:
            report = self.stepper.step(self.num_steps_done)
            self.num_steps_done += 1
            yield report

    def check_weights(self) -> None:
        """Raise NonFiniteLoss if a trained weight is not finite."""
        check_finite_weights(self.num_steps_done, self.stepper.named_parameters, self.world)

    def save(self) -> Path:
        """Save a checkpoint and return its folder; weights that are not finite raise NonFiniteLoss instead."""
        self.check_weights()
        tensors = collect_tensors(self.stepper.named_parameters, self.stepper.optimizers)
        positions = self.stepper.mixture.state()
        return save(self.out / "checkpoints", self.num_steps_done, tensors, positions, self.settings, self.world)

    def check_frozen(self) -> None:
        """Raise FrozenWeightsChanged if a frozen weight changed since the start of the run."""
        if (digest := frozen_digest(self.model, self.config.trains)) != self.digest:
            raise FrozenWeightsChanged(
                f"the frozen weights changed: their digest was {self.digest} and is now {digest}"
            )


def run(
    trainer: Trainer,
    tokenizer_json: Path,
    pause_file: Path | None = None,
    observe: Callable[[StepReport], None] = lambda report: None,
) -> None:
    """Train to the end of the run, then export the served folder `out/model`; `observe` is called after each step.

    Raises `ConfigError` while another run writes to the same `out`, and `Stopped` after a signal.
    """
    config, world = trainer.config, trainer.world
    with only_run(trainer.out, enabled=world.is_first):
        _train(trainer, pause_file, observe)
        trainer.check_weights()  # again: an old checkpoint of a finished run may hold others
        trainer.check_frozen()
        files = kept_files(tokenizer_json.parent, config)
        export(trainer.model, tokenizer_json, config.export_folder, world, config.export_name, files)
    digest = trainer.digest[:12]
    log.info("frozen weights unchanged (SHA-256 %s); %s is ready to serve", digest, config.export_folder)


def _train(trainer: Trainer, pause_file: Path | None, observe: Callable[[StepReport], None]) -> None:
    config, out, is_first = trainer.config, trainer.out, trainer.world.is_first
    num_steps_done = trainer.resume()
    is_warned = not is_first
    if is_first:
        log.info("%s", describe_precision(config.precision, trainer.world.device))
    with stop_signal() as stop, ProgressReporter(out, config.steps, num_steps_done, enabled=is_first) as progress:
        for report in trainer.steps():
            progress.report_step(report)
            observe(report)
            if report.gradient_norm == 0 and not is_warned:
                is_warned = True
                log.warning("warning: the gradient of step %d is zero: %s", report.step, NO_GRADIENT)
            if trainer.num_steps_done % config.log_steps == 0:
                gates = gate_values(trainer.model)  # on all processes, which gather sharded gates together
                progress.report_gates(gates, report.step)
                if is_first:
                    _log(out, report, gates)
            is_due = trainer.num_steps_done % config.checkpoint_steps == 0 or trainer.num_steps_done == config.steps
            if is_due:
                trainer.save()
            _wait_while_paused(pause_file, trainer.world, stop)
            if trainer.world.max(stop.number):
                if not is_due:
                    trainer.save()
                break
    if number := trainer.world.max(stop.number):
        raise Stopped(number)


def kept_files(folder: Path, config: TrainConfig) -> dict[str, str | bytes]:
    """Return the files of the initial model's folder that are also valid for the export.

    These are the sources and licences of its parts, without experts that the run replaced, and, if the vision encoder sees
    images as before, the likeness of images and the method of classification that was best with it.
    """
    files: dict[str, str | bytes] = dict(_source_file(folder, config))
    if not (config.vision or config.image_size or "vision" in config.trains):
        files |= {name: (folder / name).read_bytes() for name in (LIKENESS, PRIOR) if (folder / name).is_file()}
    return files


def _source_file(folder: Path, config: TrainConfig) -> dict[str, str]:
    replaced = {"vision model"} if config.vision else set()
    replaced |= {"language model"} if config.language_model == "scratch" else set()
    parts = tuple(part for part in read_origin(folder).parts if part.part not in replaced)
    return {SOURCE: Origin(parts=parts).to_json()} if parts else {}


def _log(out: Path, report: StepReport, gates: Mapping[str, float]) -> None:
    """Append a line of JSON, from which the model card's curves are drawn."""
    line = {**asdict(report), "gates": gates, "time": time.time()}
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _wait_while_paused(pause_file: Path | None, world: World, stop: StopSignal) -> None:
    """Wait while a process sees the file: one that went on alone would wait for the others, and fail after minutes."""
    while pause_file is not None and world.max(int(pause_file.exists())) and not world.max(stop.number):
        time.sleep(PAUSE_SECONDS)


def load_model(config: TrainConfig, folder: Path) -> Flamingo:
    """Load the run's initial model on the CPU in float32; the trainer moves and casts it."""
    model = load_folder(folder, "cpu", torch.float32)
    if config.vision:
        model = with_vision(model, load_vision_folder(Path(config.vision).expanduser()))
    if config.image_size:
        model = at_resolution(model, config.image_size)
    if "language_model" in config.trains:
        model = with_free_weights(model)
    if config.language_model == "scratch":
        model = with_new_language_model(model, config.seed)
    if config.bridge == "keep":
        data = Path(config.discriminants).expanduser()
        return with_added_kin(model, folder, config.kin, data) if config.kin else model
    if config.kin != model.config.vision.kin.dim:
        model = with_kin(model, folder, config.kin)
    model = with_ablated_bridge(model, config.ablate, config.seed)
    if config.discriminants:
        model = with_discriminants(model, Path(config.discriminants).expanduser())
    if config.frame_scale != 1:
        model = with_scaled_frames(model, config.frame_scale)
    return model
