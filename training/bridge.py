"""What trains and what must not: the bridge and the new tokens' rows, between two experts that stay as they were.

The frozen weights' digest is taken before and after a run; a run that moved one bit of them fails.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.flamingo import Flamingo
from training.batch import TrainingBatch

BRIDGE = ("resampler.", "gated.")
NEW_ROWS = ".new_rows"


def is_bridge(name: str) -> bool:
    return name.startswith(BRIDGE) or name.endswith(NEW_ROWS)


def freeze(model: Flamingo, dtype: torch.dtype) -> None:
    """Experts in `dtype` and without gradients (a convolutional encoder stays float32: a CPU is faster so), the bridge
    in float32."""
    model.language_model.to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_bridge(name))
        if is_bridge(name):
            parameter.data = parameter.data.float()


def bridge_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 of every frozen weight and of the encoder's statistics, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not is_bridge(name):
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
        logits = model(batch.batch, None, model.fresh_media(self.visual_tokens(batch.media)))  # [W, V + A]
        return nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")

    def visual_tokens(self, media: tuple[Tensor, ...]) -> Tensor:
        """Pages [M, R, D] in the media's order; those with equally many frames go through the encoder together."""
        model = self.flamingo
        dtype = model.language_model.embed.weight.dtype
        if not media:
            resampler = model.config.resampler
            return torch.zeros(0, resampler.num_latents, resampler.dim, dtype=dtype)
        by_frames: dict[int, list[int]] = {}
        for place, one in enumerate(media):
            by_frames.setdefault(len(one), []).append(place)
        parts = [
            model.resampler(self._features(torch.stack([media[place] for place in places])).to(dtype))
            for places in by_frames.values()
        ]
        order = torch.tensor([place for places in by_frames.values() for place in places])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    def _features(self, stacked: Tensor) -> Tensor:  # pixels [M, F, 3, h, w] or features [M, F, P, Dv] -> the latter
        if stacked.dim() == 4:
            return stacked
        with torch.no_grad():
            return self.flamingo.vision(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2])
