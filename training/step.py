"""A training step: it adds up the gradients of all sets (a set's loss is the mean over its targets), clips and updates.

A loss or gradient that is not finite stops the run before the update, so the last checkpoint is valid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from model.config import ConfigError
from training.batch import TrainingBatch, collate, pack
from training.bridge import BridgeLoss, gather, trained_parameters
from training.config import TrainConfig
from training.distributed import World
from training.mixture import DataSet, Mixture, PreparedExample, merge_media
from training.optim import build_optimizers, learning_rate_at, set_learning_rate

VISION = "flamingo.vision."


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is not finite, so no weight was changed; or a trained weight is not, so none is saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    step: int
    losses: Mapping[str, float]
    gradient_norm: float
    learning_rate: float
    num_tokens: int
    seconds: float


class _Backward(nn.Module):
    """A forward and its backward as one module.

    The backward then sees the weights with which the forward ran, also where it recomputes activations.
    """

    def __init__(self, loss: BridgeLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, batch: TrainingBatch, factor: Tensor) -> Tensor:
        """Add the gradients of the loss times `factor`, and return the loss."""
        value: Tensor = self.loss(batch)
        (value * factor).backward()
        return value.detach()


class Stepper:
    def __init__(self, config: TrainConfig, loss: BridgeLoss, mixture: Mixture, world: World) -> None:
        self.config = config
        self.loss = loss
        self.mixture = mixture
        self.world = world
        self.named_parameters = list(trained_parameters(loss))
        if config.optim.matrices == "muon" and world.size > 1:
            raise ConfigError(
                f"optim.matrices muon needs unsharded matrices, but {world.size} processes shard them: "
                "use adamw or one process"
            )
        self.optimizers = build_optimizers(self.named_parameters, config.optim)
        self._dtype = getattr(torch, config.precision)

    def step(self, number: int) -> StepReport:
        started = time.monotonic()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses, tokens = {}, 0
        for data_set in self.mixture.sets_for_step(number):
            losses[data_set.name], count = self._accumulate(data_set)
            tokens += count
        check_finite(number, losses)
        norm = self._clip()
        check_finite(number, {"gradient norm": norm})
        learning_rate = learning_rate_at(number, self.config.steps, self.config.optim)
        set_learning_rate(self.optimizers, learning_rate)
        for optimizer in self.optimizers:
            optimizer.step()
        return StepReport(
            step=number,
            losses=losses,
            gradient_norm=norm,
            learning_rate=learning_rate,
            num_tokens=tokens,
            seconds=time.monotonic() - started,
        )

    def _accumulate(self, data_set: DataSet) -> tuple[float, int]:
        """Add the set's gradients; return its loss over all processes and this process's number of tokens."""
        batches = self._batches(data_set.batch())
        # every process runs the same number of forwards, since all processes gather sharded weights together
        num_padding = self.world.max(len(batches)) - len(batches)
        weighted = [(batch, 1.0) for batch in batches] + [(batches[-1], 0.0)] * num_padding
        device = self.world.device
        count = self.world.sum(torch.tensor(float(sum(b.num_targets for b in batches)), device=device))
        total = torch.zeros((), device=device)
        for batch, weight in weighted:
            # FSDP takes the mean of the processes' gradients
            factor = weight * (data_set.weight * self.world.size / count.clamp(min=1.0))
            total += weight * self._backward(batch, factor)
        mean = self.world.sum(total) / count.clamp(min=1.0)
        return float(mean), sum(len(b.batch.token_ids) for b in batches)

    def _batches(self, examples: list[PreparedExample]) -> list[TrainingBatch]:
        media, config = merge_media(examples), self.loss.flamingo.config
        packs = pack((example.tokens for example in examples), self.config.pack_tokens)
        return [
            collate(
                sequences,
                media,
                self.world.device,
                all_previous=config.gated.attends == "all_previous",
                alone_positions=config.language_model.alone_positions,
            )
            for sequences in packs
        ]

    def _backward(self, batch: TrainingBatch, factor: Tensor) -> Tensor:
        # of several processes, FSDP casts the parameters
        cast = self._cast_parameters() if self.world.size == 1 else {}
        value: Tensor = functional_call(_Backward(self.loss), cast, (batch, factor))
        return value

    def _cast_parameters(self) -> dict[str, Tensor]:
        """Return the float32 parameters in the run's precision; the encoder keeps its own precision."""
        return {
            f"loss.{name}": parameter if VISION in name else parameter.to(self._dtype)
            for name, parameter in self.named_parameters
        }

    def _clip(self) -> float:
        """Clip the gradient of all sets and return its norm before clipping."""
        parameters = [parameter for _, parameter in self.named_parameters]
        max_norm = self.config.optim.clip or math.inf
        return float(gather(torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)))


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raise NonFiniteLoss if a value is infinite or not a number."""
    if bad := [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise NonFiniteLoss(f"step {step}: {', '.join(bad)}; no weight was changed")


def check_finite_weights(step: int, named: Iterable[tuple[str, nn.Parameter]], world: World) -> None:
    """Raise NonFiniteLoss if a weight of any process is infinite or not a number; all processes must call this together."""
    bad = {name: None for name, parameter in named if not _local(parameter).isfinite().all()}
    if names := sorted(world.merge(bad)):
        further = f" and {len(names) - 1} others" if len(names) > 1 else ""
        raise NonFiniteLoss(f"after step {step}: the weights {names[0]}{further} are not finite; they are not saved")


def _local(parameter: nn.Parameter) -> Tensor:
    """Return this process's part of a parameter that FSDP sharded, else the parameter itself."""
    local: Tensor = parameter.detach()
    return local.to_local() if isinstance(local, DTensor) else local
