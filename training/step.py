"""One step: gradients of every set added up, each set's loss a mean over all its targets, then clip and move.

A loss that is not finite stops the run before anything moves: what is on disk is the last good state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from model.config import ConfigError
from training.batch import TrainingBatch, collate, pack
from training.bridge import BridgeLoss, bridge_parameters
from training.config import TrainConfig
from training.distributed import World
from training.mixture import DataSet, Mixture, Prepared
from training.optim import make_optimizers, rate, set_rate

VISION = "flamingo.vision."


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is no number; nothing was changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    step: int
    losses: Mapping[str, float]
    gradient_norm: float
    learning_rate: float
    num_tokens: int
    seconds: float


class Stepper:
    def __init__(self, config: TrainConfig, loss: BridgeLoss, mixture: Mixture, world: World) -> None:
        self.config = config
        self.loss = loss
        self.mixture = mixture
        self.world = world
        self.named = list(bridge_parameters(loss))
        if config.optim.matrices == "muon" and world.size > 1:
            raise ConfigError(
                "optim.matrices muon needs whole matrices, which no process of several has: adamw, or one"
            )
        self.optimizers = make_optimizers(self.named, config.optim)
        self._dtype = getattr(torch, config.precision)

    def step(self, number: int) -> StepReport:
        began = time.monotonic()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses, tokens = {}, 0
        for one in self.mixture.of_step(number):
            losses[one.name], count = self._accumulate(one)
            tokens += count
        _refuse(number, losses)
        norm = self._clip()
        _refuse(number, {"gradient norm": norm})
        learning_rate = rate(number, self.config.steps, self.config.optim)
        set_rate(self.optimizers, learning_rate)
        for optimizer in self.optimizers:
            optimizer.step()
        return StepReport(
            step=number,
            losses=losses,
            gradient_norm=norm,
            learning_rate=learning_rate,
            num_tokens=tokens,
            seconds=time.monotonic() - began,
        )

    def _accumulate(self, one: DataSet) -> tuple[float, int]:
        """Adds the set's gradients; gives its loss over all processes, and this process's tokens."""
        batches = self._batches(one.batch())
        # every process runs as many forwards as the one with most: sharded weights are gathered by all together
        spare = self.world.most(len(batches)) - len(batches)
        counted = [(batch, 1.0) for batch in batches] + [(batches[-1], 0.0)] * spare
        device = self.world.device
        count = self.world.sum(torch.tensor(float(sum(b.num_targets for b in batches)), device=device))
        total = torch.zeros((), device=device)
        for batch, weight in counted:
            value = weight * self._forward(batch)
            # FSDP takes the mean of the processes' gradients
            (value * (one.weight * self.world.size / count.clamp(min=1.0))).backward()
            total += value.detach()
        mean = self.world.sum(total) / count.clamp(min=1.0)
        return float(mean), sum(len(b.batch.token_ids) for b in batches)

    def _batches(self, prepared: list[Prepared]) -> list[TrainingBatch]:
        media = {digest: shown for one in prepared for digest, shown in one.media.items()}
        all_previous = self.loss.flamingo.config.gated.attends == "all_previous"
        packs = pack((one.tokens for one in prepared), self.config.pack_tokens)
        return [collate(together, media, self.world.device, all_previous=all_previous) for together in packs]

    def _forward(self, batch: TrainingBatch) -> Tensor:
        if self.world.size > 1:
            return self.loss(batch)
        # what trains is kept in float32, and runs in the run's precision; the encoder runs in its own
        cast = {name: parameter if VISION in name else parameter.to(self._dtype) for name, parameter in self.named}
        out: Tensor = functional_call(self.loss, cast, (batch,))
        return out

    def _clip(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self.named], self.config.optim.clip, foreach=True)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return float(whole)


def _refuse(step: int, values: Mapping[str, float]) -> None:
    if bad := [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise NonFiniteLoss(f"step {step}: {', '.join(bad)}; nothing was changed")
