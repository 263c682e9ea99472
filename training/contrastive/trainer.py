"""Runs contrastive training: each step adds up the gradients of all sets, clips each tower by its own rule and updates.

A resumed run gives the same result. At its end it exports the image tower's encoder as a folder for `model.folder`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.optim.lamb import Lamb
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor

from model.checkpoint.files import read_pickle
from model.folder import CheckpointError, save_vision_folder
from model.prompt import open_tokenizer
from training.checkpoint import MAX_CHECKPOINTS, latest, list_checkpoints, names_damage
from training.contrastive.config import ContrastiveConfig, ContrastiveOptimConfig
from training.contrastive.data import PairReader, Pairs, PairStream, collate_pairs, read_all_pairs
from training.contrastive.towers import Towers, contrastive_loss, recall, vision_config
from training.data.shards import ShardError
from training.data.stream import find_shards
from training.distributed import World
from training.optim import learning_rate_at
from training.precision import with_precision
from training.resumed import check_steps, check_unchanged, resumed_contrastive_settings
from training.state_files import first_line
from training.step import StepReport, check_finite, check_finite_weights

log = logging.getLogger(__name__)
# of a checkpoint's file
SUFFIX = ".pt"
BATCH = 64  # pairs per forward of the recall


class ContrastiveTrainer:
    def __init__(self, config: ContrastiveConfig, device: torch.device) -> None:
        self.out = Path(config.out).expanduser()
        self.config = config = with_precision(config, World(device=device), self._load_settings())
        self.device = device
        tokenizer = open_tokenizer(Path(config.text.tokenizer).expanduser())
        torch.manual_seed(config.seed)
        self.towers = Towers(config, tokenizer.get_vocab_size()).to(device).train()
        vision = vision_config(config.image)
        self.reader = PairReader(tokenizer, vision, config.text.max_tokens, config.image.augment)
        self.streams = [PairStream(find_shards(pairs.shards), pairs, self.reader, config.seed) for pairs in config.sets]
        self.settings = resumed_contrastive_settings(config)
        self.held_out = find_shards(config.held_out) if config.held_out else ()
        self.optimizer = build_optimizer(self.towers, config.optim)
        self.num_steps_done = 0

    def steps(self) -> Iterator[StepReport]:
        while self.num_steps_done < self.config.steps:
            report = self._step(self.num_steps_done)
            self.num_steps_done += 1
            yield report

    def _step(self, number: int) -> StepReport:
        started, config = time.monotonic(), self.config
        self.optimizer.zero_grad(set_to_none=True)
        losses, tokens = {}, 0
        for stream in self.streams:
            batch = stream.batch()
            loss = self._loss(batch.to(self.device))
            (stream.config.weight * loss).backward()
            losses[stream.config.name] = float(loss.detach())
            tokens += int(batch.lengths.sum())
        norm = self._clip()
        check_finite(number, {**losses, "gradient norm": norm})
        learning_rate = learning_rate_at(number, config.steps, config.optim.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return StepReport(
            step=number,
            losses=losses,
            gradient_norm=norm,
            learning_rate=learning_rate,
            num_tokens=tokens,
            seconds=time.monotonic() - started,
        )

    def _loss(self, batch: Pairs) -> Tensor:
        images, texts = self._embed(batch)
        return contrastive_loss(images, texts, self.towers.scale, self.config.label_smoothing)

    def _embed(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        dtype = getattr(torch, self.config.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            return self.towers.image(batch.pixels), self.towers.text(batch.token_ids, batch.lengths)

    def _clip(self) -> float:
        """Clip each tower's gradients and return the norm of all gradients before clipping."""
        towers, optim = self.towers, self.config.optim
        gradients = [p.grad for p in towers.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if optim.image_clip:
            adaptive_clip_grad(towers.image.vision.parameters(), optim.image_clip)
        if optim.text_clip:
            torch.nn.utils.clip_grad_norm_(towers.text.parameters(), optim.text_clip)
        return norm

    def save(self) -> Path:
        """Save a checkpoint atomically and delete the oldest beyond `MAX_CHECKPOINTS`.

        Weights that are not finite raise NonFiniteLoss instead, and a full disk CheckpointError.
        """
        check_finite_weights(self.num_steps_done, self.towers.named_parameters(), World(device=self.device))
        folder = self.out / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        path, partial = folder / f"step-{self.num_steps_done:08}{SUFFIX}", folder / "partial.pt"
        state = {
            "step": self.num_steps_done,
            "towers": self.towers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": self.settings,
            "streams": {stream.config.name: stream.state() for stream in self.streams},
        }
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
        except KeyboardInterrupt:
            partial.unlink(missing_ok=True)
            raise
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)  # it may have filled the disk
            raise CheckpointError(f"{path} cannot be written: {first_line(error)}") from None
        partial.rename(path)
        for old in list_checkpoints(folder, SUFFIX)[:-MAX_CHECKPOINTS]:
            old.unlink()
        return path

    def resume(self) -> int:
        """Continue from the latest checkpoint, if one exists, and return the number of steps done.

        Raises `ConfigError` if it is of a run with other settings, or of more steps than the run is to have, and
        `CheckpointError` if it is damaged.
        """
        if (path := latest(self.out / "checkpoints", SUFFIX)) is not None:
            state = _read(path)
            check_unchanged(path, state.get("settings"), self.settings)
            check_steps(path, state["step"], self.config.steps)
            with names_damage(path):
                self._load(state)
            self.num_steps_done = state["step"]
            log.info("resuming from %s", path)
        return self.num_steps_done

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self.towers.load_state_dict(state["towers"])
        except RuntimeError as error:  # other names or shapes
            raise CheckpointError(f"{' '.join(str(error).split()):.200}") from None
        # a copy, because the tensors of the file are mapped
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        for stream in self.streams:
            stream.load_state(state["streams"][stream.config.name])

    def _load_settings(self) -> dict[str, Any] | None:
        """Return the settings of the latest checkpoint; its tensors are not read."""
        path = latest(self.out / "checkpoints", SUFFIX)
        return None if path is None else _read(path).get("settings")

    def export(self) -> Path:
        """Write the image tower without its projection to `out/vision`, as the encoder for the bridge's training."""
        vision = self.towers.image.vision
        folder = self.out / "vision"
        save_vision_folder(folder, vision.config, vision.state_dict())
        return folder

    @torch.inference_mode()
    def recall(self, shards: Sequence[Path]) -> tuple[float, float]:
        """Return recall at 1, image to text and text to image, among all pairs of these shards.

        Raises `ShardError` if they have no good pair.
        """
        reader = PairReader(self.reader.tokenizer, self.reader.vision, self.reader.max_tokens, augment=False)
        pairs = read_all_pairs(shards, reader)
        self.towers.eval()
        parts = []
        while batch := list(islice(pairs, BATCH)):  # all images of the shards may not fit into memory
            parts.append(self._embed(collate_pairs(batch).to(self.device)))
        self.towers.train()
        if not parts:
            raise ShardError(f"held_out: no record of {', '.join(map(str, shards))} is a good pair")
        return recall(torch.cat([images for images, _ in parts]), torch.cat([texts for _, texts in parts]))


def _read(path: Path) -> dict[str, Any]:
    with names_damage(path):
        state = read_pickle(path)
        state["step"] = int(state["step"])
    return state


def build_optimizer(towers: Towers, config: ContrastiveOptimConfig) -> torch.optim.Optimizer:
    decayed = [p for p in towers.parameters() if p.dim() >= 2]
    undecayed = [p for p in towers.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    if config.optimizer == "lamb":
        # LAMB's own clipping is off, because each tower has been clipped by its own rule
        optimizer: torch.optim.Optimizer = Lamb(groups, lr=config.learning_rate, betas=config.betas, max_grad_norm=None)
        return optimizer
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
