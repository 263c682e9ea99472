"""Flamingo (Alayrac et al., 2022, figure 3): frozen vision and language models, joined by a resampler and gated layers.

The same class is used for training (no cache, media projected in each forward) and for serving (caches as arguments). The
keys and values of a media item are computed once; a text token reads the one page that its slot names.

    pixels -> vision -> resampler -> visual tokens -> media keys and values      once per media: `encode_media`, `media_kv`
    token ids -> [gated layer ->] language-model layer -> ... -> logits          each step: `forward`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.media_attention import MediaPlan, media_attention, plan_media
from kernels.rows import gated_residual
from kernels.tiles import by_row
from model.batch import Batch, KVCache, MediaPages, NoCache
from model.config import FlamingoConfig, GatedConfig
from model.language_model import LanguageModel
from model.layers import FeedForward, LayerNorm, RMSNorm, make_norm
from model.quantised import QuantisedLinear
from model.ranks import ALONE, Rank
from model.vision import VisionEncoder, build_resampler

QK_NORM_EPS = 1e-6


class Flamingo(nn.Module):
    """A model of this configuration: the whole model, or one rank's part of it (`rank_config`)."""

    def __init__(self, config: FlamingoConfig, rank: Rank = ALONE) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.resampler = build_resampler(config.resampler, config.vision.width)
        self.language_model = LanguageModel(config.language_model, rank)
        self.gated = nn.ModuleDict(
            {
                str(layer): GatedCrossAttention(config.gated, config.language_model.dim, config.resampler.dim)
                for layer in config.gated_layers
            }
        )

    def forward(self, batch: Batch, kv_cache: KVCache | NoCache, media_pages: MediaPages) -> Tensor:
        """Compute the logits [W, V + A] of the rows `batch.last_token` among the packed tokens [T]."""
        x = self.language_model.embed_tokens(batch)  # [T, D]
        context = self.language_model.step_context(batch, x.dtype, kv_cache.layer(0))
        plan = self.media_plan(batch, x)
        for i, gated, layer in self.layers():
            if gated is not None:
                x = gated(x, media_pages.layer(i), batch.media_slot, plan)  # text reads its own image
            x = layer(x, context, kv_cache.layer(i))
        return self.language_model.logits(x[batch.last_token])

    def media_plan(self, batch: Batch, x: Tensor) -> MediaPlan | None:
        """Return how all gated layers read the media pages: the batch's plan, or one that is made from its slots."""
        if batch.media_plan is not None:
            return batch.media_plan
        return plan_media(x, batch.media_slot, self.config.gated.head_dim)

    def layers(self) -> list[tuple[int, GatedCrossAttention | None, nn.Module]]:
        """Return the language model's layers in order: index, gated layer before it or None, and the layer itself."""
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
        """Return the slots of tokens if page m holds media m; for "all previous images", all pages up to the index."""
        if self.config.gated.attends == "last":
            return list(media_index)
        num_slots = max([*media_index, 0]) + 1
        return [[m if m <= index else -1 for m in range(num_slots)] for index in media_index]

    def fold_gates(self) -> None:
        """Multiply each gate into the weights that it scales, for inference (in float32, before the cast)."""
        for gated in self.gated_layers().values():
            gated.fold_gates()


class MediaCrossAttention(nn.Module):
    """Cross-attention from text to media pages; `project_media` computes the pages."""

    def __init__(self, config: GatedConfig, dim: int, media_dim: int) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.query = nn.Linear(dim, inner, bias=False)
        self.key_value = nn.Linear(media_dim, 2 * inner, bias=False)
        self.output = nn.Linear(inner, dim, bias=False)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, media_kv: Tensor, media_slot: Tensor, plan: MediaPlan | None) -> Tensor:
        query = self.query(x).unflatten(-1, (-1, self.head_dim))  # [T, H, K]
        norm = self.query_norm
        attended = media_attention(
            query,
            media_kv,
            media_slot,
            scale=self.head_dim**-0.5,
            query_norm=None if norm is None else norm.weight,
            query_norm_eps=QK_NORM_EPS if norm is None else norm.eps,
            plan=plan,
        )
        return self.output(attended.flatten(-2))

    def project_media(self, visual_tokens: Tensor) -> Tensor:  # [M, R, D] -> [M, H, 2, R, K]
        key, value = self.key_value(visual_tokens).unflatten(-1, (2, -1, self.head_dim)).unbind(2)  # [M, R, H, K]
        if self.key_norm is not None:
            key = self.key_norm(key)
        return torch.stack([key, value]).permute(1, 3, 0, 2, 4)


class GatedCrossAttention(nn.Module):
    """GATED XATTN-DENSE (figure 4): text reads its own image, then passes a feed-forward; each has a tanh gate.

    Gates start at zero, so an untrained bridge leaves the frozen language model unchanged, bit for bit. Shapes: x [T, D],
    pages [M, H, 2, R, K] and slots [T] -> [T, D]; `plan` is made by `plan_media`.
    """

    def __init__(self, config: GatedConfig, dim: int, media_dim: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, dim, config.norm_eps)
        self.media_norm = LayerNorm(media_dim, config.norm_eps) if config.media_norm else nn.Identity()
        self.attention = MediaCrossAttention(config, dim, media_dim)
        self.attn_gate = _gate(config, dim)
        self.ffw_norm = make_norm(config.norm, dim, config.norm_eps)
        self.feed_forward = FeedForward(dim, config.ffn_dim, config.activation, gated=config.gated_ffn)
        self.ffw_gate = _gate(config, dim)
        self.needs_media = config.needs_media
        self.is_closed = False
        self._folded_openness: tuple[float, float] | None = None

    def forward(self, x: Tensor, media_kv: Tensor, media_slot: Tensor | None, plan: MediaPlan | None = None) -> Tensor:
        if self.is_closed or (self.needs_media and media_slot is None):
            return x
        if media_slot is None:
            return _gated(x, self.feed_forward(self.ffw_norm(x)), self.ffw_gate)
        # attention adds exactly zero to a token without media
        attended = self.attention(self.attention_norm(x), media_kv, media_slot, plan)
        if self.attn_gate is None and self.ffw_gate is None:
            y = self.feed_forward.added_to(*self.ffw_norm.of_sum(x, attended))
        else:
            y = _gated(x, attended, self.attn_gate)
            y = _gated(y, self.feed_forward(self.ffw_norm(y)), self.ffw_gate)
        return torch.where(reads_media(media_slot), y, x) if self.needs_media else y

    def project_media(self, visual_tokens: Tensor) -> Tensor:
        return self.attention.project_media(self.media_norm(visual_tokens))

    def openness(self) -> tuple[float, float]:
        """Return tanh of the gates of attention and feed-forward, folded or not; of a vector, the mean absolute value."""
        if self._folded_openness is not None:
            return self._folded_openness
        return _openness(self.attn_gate), _openness(self.ffw_gate)

    def fold_gates(self) -> None:
        """Multiply tanh(gate) into the output weights, in float32, so that inference adds a branch without a gate.

        With both gates at zero, the layer is skipped.
        """
        gates = [gate for gate in (self.attn_gate, self.ffw_gate) if gate is not None]
        if not gates:
            return
        self._folded_openness = self.openness()
        self.is_closed = not any(bool(gate.any()) for gate in gates)
        _fold(self.attention.output, self.attn_gate)
        _fold(self.feed_forward.down, self.ffw_gate)
        self.attn_gate = self.ffw_gate = None


def reads_media(media_slot: Tensor) -> Tensor:  # [T] or [T, J] -> [T, 1], true where a token reads a page
    return (by_row(media_slot) >= 0).any(1, keepdim=True)


def _openness(gate: Tensor | None) -> float:
    if gate is None:
        return 1.0
    opened = gate.detach().float().tanh()
    return float(opened if opened.numel() == 1 else opened.abs().mean())


def _gate(config: GatedConfig, dim: int) -> nn.Parameter | None:
    if config.gate == "none":
        return None
    return nn.Parameter(torch.zeros(1 if config.gate == "scalar" else dim))


def _gated(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else gated_residual(x, branch, gate)


@torch.no_grad()
def _fold(linear: nn.Linear | QuantisedLinear, gate: Tensor | None) -> None:
    if gate is None:
        return
    openness = gate.float().tanh()
    if isinstance(linear, QuantisedLinear):
        linear.scale_features(openness)
    else:
        linear.weight.copy_((linear.weight.float() * openness[:, None]).to(linear.weight.dtype))
