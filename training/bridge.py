"""Selects the trained parameters: the bridge and the new tokens' rows; the two experts that they connect are frozen.

A run may also list an expert in `trains` (fine-tuning and ablations). The digest of all frozen weights is computed before
and after the run, and a run that changed one bit of them fails. The encoder's batch statistics never change, even if the
encoder is trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from model.batch import NO_CACHE
from model.flamingo import Flamingo
from training.batch import TrainingBatch

BRIDGE = ("resampler.", "gated.")
NEW_ROWS = ".new_rows"


def is_bridge(name: str) -> bool:
    return name.startswith(BRIDGE) or name.endswith(NEW_ROWS)


def is_trained(name: str, trains: Sequence[str]) -> bool:
    """Return whether the parameter belongs to one of the parts in `trains`."""
    part = "bridge" if is_bridge(name) else name.partition(".")[0]
    return part in trains


def freeze(model: Flamingo, dtype: torch.dtype, trains: Sequence[str] = ("bridge",)) -> None:
    """Cast frozen parameters to `dtype`, and trained ones to float32 with gradients.

    The encoder always stays in float32: a convolutional encoder is faster in float32 on a CPU, and its statistics are
    float32 in any case.
    """
    for name, parameter in model.named_parameters():
        trained = is_trained(name, trains)
        parameter.requires_grad_(trained)
        if not name.startswith("vision."):
            parameter.data = parameter.data.to(torch.float32 if trained else dtype)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def frozen_digest(model: nn.Module, trains: Sequence[str] = ("bridge",)) -> str:
    """Return the SHA-256 of every frozen weight and of the encoder's statistics, in the order of their names."""
    digest = hashlib.sha256()
    statistics = {name for name, _ in model.named_buffers()}
    for name, tensor in sorted(model.state_dict().items()):
        if name in statistics or not is_trained(name, trains):
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return gather(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def gather(tensor: Tensor) -> Tensor:
    """Return the whole tensor if FSDP sharded it, else the tensor itself; all processes must call this together."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


class BridgeLoss(nn.Module):
    """The sum of the targets' losses of a batch, as one module, so that sharding wraps the whole computation."""

    def __init__(self, flamingo: Flamingo) -> None:
        super().__init__()
        self.flamingo = flamingo

    def forward(self, batch: TrainingBatch) -> Tensor:
        model = self.flamingo
        logits = model(batch.batch, NO_CACHE, model.fresh_media(self.visual_tokens(batch.media)))  # [W, V + A]
        return nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")

    def visual_tokens(self, media: tuple[Tensor, ...]) -> Tensor:
        """Return pages [M, R, D] in the media's order; media with equally many frames share one resampler call."""
        model = self.flamingo
        dtype = model.language_model.embed.weight.dtype
        if not media:
            resampler = model.config.resampler
            return torch.zeros(0, resampler.num_latents, resampler.dim, dtype=dtype)
        features = self.features(media)
        by_frames: dict[int, list[int]] = {}
        for index, frames in enumerate(features):
            by_frames.setdefault(len(frames), []).append(index)
        parts = [
            model.resampler(torch.stack([features[index] for index in indices]).to(dtype))
            for indices in by_frames.values()
        ]
        order = torch.tensor([index for indices in by_frames.values() for index in indices])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    def features(self, media: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return features with kin [F, P, Dv] for media that are pixels [F, 3, h, w], features, or features with kin.

        All pixels go through the encoder in one call, so that every process gathers a sharded encoder equally often.
        """
        if media[0].dim() == 3:
            return tuple(map(self.flamingo.vision.with_kin, media))
        return self.flamingo.vision(torch.cat(media)).split([len(frames) for frames in media])
