"""Toy data and runs for the tests of training: images of one colour with its name, in shards, and a tiny model."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from model.config import FlamingoConfig
from model.folder import save_folder
from tests.tiny_models import CONFIGS, byte_tokenizer, prompt_tokenizer, tiny_model
from training.config import OptimConfig, SetConfig, TrainConfig
from training.data.make import write_shards
from training.data.shards import RawRecord
from training.distributed import World
from training.sets import build_mixture, loss_factory
from training.trainer import Trainer, load_model

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
CONFIG: FlamingoConfig = CONFIGS["flamingo"]


def png(colour: tuple[int, int, int], shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), tuple(max(0, c - shade) for c in colour)).save(out, "PNG")
    return out.getvalue()


def pairs(count: int) -> list[RawRecord]:
    names = list(COLOURS)
    return [
        RawRecord(f"{n}", {"png": png(COLOURS[names[n % 4]], n % 32), "txt": names[n % 4].encode()})
        for n in range(count)
    ]


def make_run(
    folder: Path,
    *,
    steps: int = 4,
    streams: int = 2,
    precision: str = "float32",
    trains: tuple[str, ...] = ("bridge",),
    model: FlamingoConfig = CONFIG,
) -> TrainConfig:
    """Write a model folder and shards, and return a run over them."""
    save_folder(folder / "model", model, tiny_model(model).state_dict().items(), byte_tokenizer().to_str())
    write_shards(pairs(40), folder / "shards", 10)
    data_set = SetConfig(
        name="pairs", kind="pairs", shards=str(folder / "shards/*.tar"), batch_size=4, streams=streams, window=4
    )
    return TrainConfig(
        model=str(folder / "model"),
        out=str(folder / "out"),
        steps=steps,
        sets=(data_set, replace(data_set, name="again", weight=0.2, batch_size=2)),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        trains=trains,
        precision=precision,  # type: ignore[arg-type]
        pack_tokens=24,
        checkpoint_steps=2,
        log_steps=1,
    )


def make_trainer(config: TrainConfig, world: World | None = None) -> Trainer:
    world = world or World()
    model = load_model(config, Path(config.model))
    tokenizer = prompt_tokenizer()
    return Trainer(
        config, model, build_mixture(config, model, tokenizer, world), world, loss_factory(config, tokenizer)
    )


def losses(trainer: Trainer) -> list[dict[str, float]]:
    torch.manual_seed(0)
    return [dict(report.losses) for report in trainer.steps()]
