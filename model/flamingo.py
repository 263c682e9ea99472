"""Flamingo (Alayrac et al., 2022, figure 3): frozen vision and language models, joined by a resampler and gated layers.

The same class trains (no cache, media newly projected) and serves (caches as arguments).

    pixels -> vision -> resampler -> visual tokens -> media keys and values      once per media: `encode_media`, `media_kv`
    token ids -> [gated layer ->] language-model layer -> ... -> logits          each step: `forward`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.media_attention import plan_media
from model.batch import Batch, KVCache, MediaPages, NoCache
from model.config import FlamingoConfig
from model.gated_cross_attention import GatedCrossAttention
from model.language_model import LanguageModel
from model.resampler_ablations import build_resampler
from model.vision import VisionEncoder


class Flamingo(nn.Module):
    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.resampler = build_resampler(config.resampler, config.vision.feature_dim)
        self.language_model = LanguageModel(config.language_model)
        self.gated = nn.ModuleDict(
            {
                str(layer): GatedCrossAttention(config.gated, config.language_model.dim, config.resampler.dim)
                for layer in config.gated_layers
            }
        )

    def forward(self, batch: Batch, kv_cache: KVCache | NoCache, media_pages: MediaPages) -> Tensor:
        """Compute the logits [W, V + A] of the rows in `batch.last_token`, of packed token ids [T]."""
        x = self.language_model.embed_tokens(batch)  # [T, D]
        context = self.language_model.step_context(batch, x.dtype, kv_cache.layer(0))
        plan = plan_media(x, batch.media_slot, self.config.gated.head_dim)
        for i, gated, layer in self.layers():
            if gated is not None:
                x = gated(x, media_pages.layer(i), batch.media_slot, plan)  # text reads its own image
            x = layer(x, context, kv_cache.layer(i))
        return self.language_model.logits(x[batch.last_token])

    def layers(self) -> list[tuple[int, GatedCrossAttention | None, nn.Module]]:
        """Return the language model's layers in order: index, the gated layer before it if there is one, and the layer."""
        gated = self.gated_layers()
        return [(i, gated.get(i), layer) for i, layer in enumerate(self.language_model.layers)]

    def gated_layers(self) -> dict[int, GatedCrossAttention]:
        """Return the gated layers by the index of the language-model layer that follows each."""
        return {int(i): gated for i, gated in self.gated.items() if isinstance(gated, GatedCrossAttention)}

    def encode_media(self, pixels: Tensor) -> Tensor:
        """Encode normalised frames [M, F, 3, h, w] as visual tokens [M, R, D]."""
        return self.resampler(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:  # [M, F, 3, h, w] -> [M, F, P, Dv]
        return self.vision(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])

    def media_kv(self, visual_tokens: Tensor) -> Tensor:
        """Project visual tokens [M, R, D] to the pages of all gated layers [M, X, H, 2, R, K]."""
        return torch.stack([gated.project_media(visual_tokens) for gated in self.gated_layers().values()], dim=1)

    def fresh_media(self, visual_tokens: Tensor) -> MediaPages:
        """Return the pages of just these media, page m for media m."""
        return MediaPages(self.media_kv(visual_tokens), self.config.gated_layers)

    def media_slots(self, media_index: Sequence[int]) -> list[int] | list[list[int]]:
        """Return the slots of tokens where page m holds media m; for "all previous images", all pages up to the index."""
        if self.config.gated.attends == "last":
            return list(media_index)
        num_slots = max([*media_index, 0]) + 1
        return [[m if m <= index else -1 for m in range(num_slots)] for index in media_index]

    def fold_gates(self) -> None:
        """Multiply each gate into the weights that it scales, for inference (in float32, before the cast)."""
        for gated in self.gated_layers().values():
            gated.fold_gates()
