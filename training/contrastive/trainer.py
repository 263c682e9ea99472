"""A contrastive run: gradients of every set added up, clipped as each tower needs it, one move; resumed exactly; at its end
the image tower's encoder is a folder that `model.checkpoint.vision_folder` reads.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from timm.optim.lamb import Lamb
from timm.utils.agc import adaptive_clip_grad
from tokenizers import Tokenizer
from torch import Tensor

from model.checkpoint.vision_folder import save_vision_folder
from training.contrastive.config import ContrastiveConfig, SpeedConfig
from training.contrastive.data import Pairs, PairStream, Reader, every_pair, together
from training.contrastive.towers import Towers, contrastive_loss, recall, vision_config
from training.data.stream import find_shards
from training.optim import rate
from training.step import NonFiniteLoss, StepReport

log = logging.getLogger(__name__)
KEPT = 2
BATCH = 64


class ContrastiveTrainer:
    def __init__(self, config: ContrastiveConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.out = Path(config.out).expanduser()
        tokenizer = Tokenizer.from_file(str(Path(config.text.tokenizer).expanduser()))
        torch.manual_seed(config.seed)
        self.towers = Towers(config, tokenizer.get_vocab_size()).to(device).train()
        vision = vision_config(config.image)
        self.reader = Reader(tokenizer, vision, config.text.max_tokens, config.image.augment)
        self.streams = [PairStream(find_shards(one.shards), one, self.reader, config.seed) for one in config.sets]
        self.optimizer = make_optimizer(self.towers, config.optim)
        self.done = 0

    def steps(self) -> Iterator[StepReport]:
        while self.done < self.config.steps:
            report = self._step(self.done)
            self.done += 1
            yield report

    def _step(self, number: int) -> StepReport:
        began, config = time.monotonic(), self.config
        self.optimizer.zero_grad(set_to_none=True)
        losses, tokens = {}, 0
        for stream in self.streams:
            batch = stream.batch()
            loss = self._loss(batch.to(self.device))
            (stream.config.weight * loss).backward()
            losses[stream.config.name] = float(loss.detach())
            tokens += int(batch.lengths.sum())
        norm = self._clip()
        if bad := [name for name, value in {**losses, "gradient norm": norm}.items() if not math.isfinite(value)]:
            raise NonFiniteLoss(f"step {number}: {', '.join(bad)} is no number; nothing was changed")
        learning_rate = rate(number, config.steps, config.optim.course)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return StepReport(
            step=number,
            losses=losses,
            gradient_norm=norm,
            learning_rate=learning_rate,
            num_tokens=tokens,
            seconds=time.monotonic() - began,
        )

    def _loss(self, batch: Pairs) -> Tensor:
        images, texts = self._embed(batch)
        return contrastive_loss(images, texts, self.towers.scale, self.config.label_smoothing)

    def _embed(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        dtype = getattr(torch, self.config.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            return self.towers.image(batch.pixels), self.towers.text(batch.token_ids, batch.lengths)

    def _clip(self) -> float:
        """Gives the norm of all gradients as they were."""
        towers, optim = self.towers, self.config.optim
        gradients = [p.grad for p in towers.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if optim.image_clip:
            adaptive_clip_grad(towers.image.vision.parameters(), optim.image_clip)
        if optim.text_clip:
            torch.nn.utils.clip_grad_norm_(towers.text.parameters(), optim.text_clip)
        return norm

    def save(self) -> Path:
        """The file arrives whole; the last two are kept."""
        folder = self.out / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        place, partial = folder / f"step-{self.done:08}.pt", folder / "partial.pt"
        state = {
            "step": self.done,
            "towers": self.towers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "streams": {stream.config.name: stream.state() for stream in self.streams},
        }
        torch.save(state, partial)
        partial.rename(place)
        for old in sorted(folder.glob("step-*.pt"))[:-KEPT]:
            old.unlink()
        return place

    def resume(self) -> int:
        """Goes on from the latest checkpoint if there is one; gives the number of steps done."""
        place = max((self.out / "checkpoints").glob("step-*.pt"), default=None)
        if place is not None:
            state = torch.load(place, map_location=self.device, weights_only=True)
            self.towers.load_state_dict(state["towers"])
            self.optimizer.load_state_dict(state["optimizer"])
            for stream in self.streams:
                stream.load_state(state["streams"][stream.config.name])
            self.done = state["step"]
            log.info("going on from %s", place)
        return self.done

    def export(self) -> Path:
        """The image tower without its projection: what the bridge's training freezes."""
        vision = self.towers.image.vision
        folder = self.out / "vision"
        save_vision_folder(folder, vision.config, vision.state_dict())
        return folder

    @torch.inference_mode()
    def recall(self, shards: Sequence[Path]) -> tuple[float, float]:
        """Recall at one among all pairs of these shards: image to text, text to image."""
        reader = Reader(self.reader.tokenizer, self.reader.vision, self.reader.max_tokens, augment=False)
        pairs = list(every_pair(shards, reader))
        self.towers.eval()
        parts = [
            self._embed(together(pairs[first : first + BATCH]).to(self.device)) for first in range(0, len(pairs), BATCH)
        ]
        self.towers.train()
        return recall(torch.cat([images for images, _ in parts]), torch.cat([texts for _, texts in parts]))


def make_optimizer(towers: Towers, config: SpeedConfig) -> torch.optim.Optimizer:
    decayed = [p for p in towers.parameters() if p.dim() >= 2]
    others = [p for p in towers.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "lamb":
        # its own clipping of the whole norm is off: each tower is clipped by its own rule before
        optimizer: torch.optim.Optimizer = Lamb(groups, lr=config.learning_rate, betas=config.betas, max_grad_norm=None)
        return optimizer
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
