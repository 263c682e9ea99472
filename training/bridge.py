"""What trains and what must not: the bridge and the new tokens' rows, between two experts that stay as they were.

A run may name an expert among what it `trains` (fine-tuning, and ablations). The digest of all that is frozen is taken
before and after; a run that moved one bit of it fails. The encoder's batch statistics never move, trained or not.
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
    """Whether the parameter belongs to one of the named parts."""
    part = "bridge" if is_bridge(name) else name.partition(".")[0]
    return part in trains


def freeze(model: Flamingo, dtype: torch.dtype, trains: Sequence[str] = ("bridge",)) -> None:
    """What is frozen in `dtype`, what trains in float32 and with gradients. The encoder stays in float32, trained or not:
    a convolutional one is faster so on a CPU, and its statistics are float32 in any case."""
    for name, parameter in model.named_parameters():
        trained = is_trained(name, trains)
        parameter.requires_grad_(trained)
        if not name.startswith("vision."):
            parameter.data = parameter.data.to(torch.float32 if trained else dtype)


def bridge_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def frozen_digest(model: nn.Module, trains: Sequence[str] = ("bridge",)) -> str:
    """SHA-256 of every frozen weight and of the encoder's statistics, in the order of their names."""
    digest = hashlib.sha256()
    statistics = {name for name, _ in model.named_buffers()}
    for name, tensor in sorted(model.state_dict().items()):
        if name in statistics or not is_trained(name, trains):
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class BridgeLoss(nn.Module):
    """A batch to the sum of its targets' losses: one forward, so that sharding wraps it whole."""

    def __init__(self, flamingo: Flamingo) -> None:
        super().__init__()
        self.flamingo = flamingo

    def forward(self, batch: TrainingBatch) -> Tensor:
        model = self.flamingo
        logits = model(batch.batch, NO_CACHE, model.fresh_media(self.visual_tokens(batch.media)))  # [W, V + A]
        return nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")

    def visual_tokens(self, media: tuple[Tensor, ...]) -> Tensor:
        """Pages [M, R, D] in the media's order; those with equally many frames go through the resampler together."""
        model = self.flamingo
        dtype = model.language_model.embed.weight.dtype
        if not media:
            resampler = model.config.resampler
            return torch.zeros(0, resampler.num_latents, resampler.dim, dtype=dtype)
        features = self._features(media)
        by_frames: dict[int, list[int]] = {}
        for place, one in enumerate(features):
            by_frames.setdefault(len(one), []).append(place)
        parts = [
            model.resampler(torch.stack([features[place] for place in places]).to(dtype))
            for places in by_frames.values()
        ]
        order = torch.tensor([place for places in by_frames.values() for place in places])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    def _features(self, media: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pixels [F, 3, h, w] each, or features [F, P, Dv] already -> the latter, by one call for all: an encoder that
        is sharded is gathered equally often everywhere."""
        if media[0].dim() == 3:
            return media
        return self.flamingo.vision(torch.cat(media)).split([len(one) for one in media])
