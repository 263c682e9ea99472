"""Connects the processes of a training run, reduces values over them and shards weights with FSDP2.

`torchrun` starts several processes; a process that was started alone has a world of size one and needs no process group.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from training.bridge import BridgeLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, value: int) -> int:
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def merge(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of all processes in one dictionary, on every process."""
        if self.size == 1:
            return part
        parts: list[dict[str, Any]] = [{} for _ in range(self.size)]
        dist.all_gather_object(parts, part)
        return {name: value for entries in parts for name, value in entries.items()}

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join() -> World:
    """Return the world that torchrun describes, or a world of size one."""
    on_gpu = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        return World(device=torch.device("cuda" if on_gpu else "cpu"))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    return World(rank=rank, size=dist.get_world_size(), device=device)


def leave(world: World) -> None:
    """End a successful run; if there are several processes, all must call this, and each exits here.

    Gloo's threads may still hold tensors of the last collectives. A thread that releases them during Python's shutdown
    aborts the process, and with it a finished run, so Python's shutdown is skipped.
    """
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def checkpoint_activations(loss: BridgeLoss) -> None:
    """Recompute the decoder layers' activations in the backward pass instead of storing them."""
    layers = loss.flamingo.language_model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)


def shard(loss: BridgeLoss, precision: torch.dtype) -> None:
    """Shard each decoder layer and each gated layer as its own unit, and the rest with the whole loss.

    The resampler belongs to the rest, because one process may call it more often than another.
    """
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    model = loss.flamingo
    for layer in (*model.language_model.layers, *model.gated.values()):
        fully_shard(layer, mp_policy=policy)
    for gated in model.gated.values():
        register_fsdp_forward_method(gated, "project_media")
    # the encoder's statistics are buffers, and its convolutions keep their own precision
    if any(parameter.requires_grad for parameter in model.vision.parameters()):
        fully_shard(model.vision, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        fully_shard(loss, mp_policy=policy)
    else:
        fully_shard(loss, mp_policy=policy, ignored_params=set(model.vision.parameters()))
