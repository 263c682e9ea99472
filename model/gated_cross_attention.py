"""GATED XATTN-DENSE (Flamingo, figure 4): text reads its own image, then passes a feed-forward; each has a tanh gate.

Gates start at zero, so an untrained bridge leaves the frozen language model unchanged, bit for bit. The keys and values of
a media item are computed once, by `project_media`; a text token reads the one page that its slot names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.gated_residual import gated_residual
from kernels.media_attention import MediaPlan, media_attention
from kernels.tiles import by_row
from model.config import GatedConfig
from model.layers import FeedForward, LayerNorm, RMSNorm, make_norm

QK_NORM_EPS = 1e-6


class MediaCrossAttention(nn.Module):
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

    def project_media(self, visual_tokens: Tensor) -> Tensor:  # [M, R, Dv] -> [M, H, 2, R, K]
        key, value = self.key_value(visual_tokens).unflatten(-1, (2, -1, self.head_dim)).unbind(2)  # [M, R, H, K]
        if self.key_norm is not None:
            key = self.key_norm(key)
        return torch.stack([key, value]).permute(1, 3, 0, 2, 4)


class GatedCrossAttention(nn.Module):
    """A gated layer: x [T, D], pages [M, H, 2, R, K] and slots [T] -> [T, D]; `plan` is that of `plan_media`."""

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
        y = x
        if media_slot is not None:  # to a token without media, attention adds exactly zero
            y = _gated(y, self.attention(self.attention_norm(y), media_kv, media_slot, plan), self.attn_gate)
        y = _gated(y, self.feed_forward(self.ffw_norm(y)), self.ffw_gate)
        return torch.where(reads_media(media_slot), y, x) if self.needs_media and media_slot is not None else y

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
def _fold(linear: nn.Linear, gate: Tensor | None) -> None:
    if gate is None:
        return
    folded = linear.weight.float() * gate.float().tanh()[:, None]
    linear.weight.copy_(folded.to(linear.weight.dtype))
