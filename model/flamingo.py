"""Flamingo (Alayrac et al., 2022, figure 3): a frozen vision encoder and a frozen language model, joined by a resampler
and gated cross-attention. The same class trains (no cache, media freshly projected) and serves (caches as arguments).

    pixels -> vision -> resampler -> visual tokens -> media keys and values      once a media, `encode_media`, `media_kv`
    token ids -> [gated layer ->] language-model layer -> ... -> logits          each step, `forward`
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
        """Packed token ids [T] -> logits [W, V + A] of the rows in `batch.last_token`."""
        x = self.language_model.embed_tokens(batch)  # [T, D]
        context = self.language_model.step_context(batch, x.dtype, kv_cache.layer(0))
        plan = plan_media(x, batch.media_slot, self.config.gated.head_dim)
        for i, gated, layer in self.layers():
            if gated is not None:
                x = gated(x, media_pages.layer(i), batch.media_slot, plan)  # text reads its own image
            x = layer(x, context, kv_cache.layer(i))
        return self.language_model.logits(x[batch.last_token])

    def layers(self) -> list[tuple[int, GatedCrossAttention | None, nn.Module]]:
        """The language model's layers in order: each one's index, the gated layer before it if it has one, and itself."""
        gated = self.gated_layers()
        return [(i, gated.get(i), layer) for i, layer in enumerate(self.language_model.layers)]

    def gated_layers(self) -> dict[int, GatedCrossAttention]:
        """The gated layers by the index of the language-model layer that each one stands before."""
        return {int(i): gated for i, gated in self.gated.items() if isinstance(gated, GatedCrossAttention)}

    def encode_media(self, pixels: Tensor) -> Tensor:
        """Normalised frames [M, F, 3, h, w] -> visual tokens [M, R, D]."""
        return self.resampler(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:  # [M, F, 3, h, w] -> [M, F, P, Dv]
        return self.vision(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])

    def media_kv(self, visual_tokens: Tensor) -> Tensor:
        """Visual tokens [M, R, D] -> the pages of all gated layers [M, X, H, 2, R, K]."""
        return torch.stack([gated.project_media(visual_tokens) for gated in self.gated_layers().values()], dim=1)

    def fresh_media(self, visual_tokens: Tensor) -> MediaPages:
        """Return the pages of just these media, page m for media m."""
        return MediaPages(self.media_kv(visual_tokens), self.config.gated_layers)

    def media_slots(self, media_index: Sequence[int]) -> list[int] | list[list[int]]:
        """Return the slots of tokens where page m is media m; for "all previous images", every page up to the index."""
        if self.config.gated.attends == "last":
            return list(media_index)
        most = max([*media_index, 0]) + 1
        return [[m if m <= index else -1 for m in range(most)] for index in media_index]

    def fold_gates(self) -> None:
        """For inference: multiply each gate into the weights that it scales (in float32, before the cast)."""
        for gated in self.gated_layers().values():
            gated.fold_gates()
