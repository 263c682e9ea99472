"""Stage 4: one gated layer as in the reference, and with folded gates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench.correctness import device_tiles
from kernels.bench.machine import Machine
from kernels.bench.measure import Report, Stopwatch
from kernels.bench.sizes import Sizes, Spec
from kernels.media_attention import media_attention
from kernels.rows import gated_residual, layer_norm

STAGE = "4 gated layer"
DTYPE = torch.bfloat16
EPS = 1e-5


def weight(num_outputs: int, num_inputs: int, device: torch.device) -> Tensor:
    return torch.randn(num_outputs, num_inputs, device=device, dtype=DTYPE) * num_inputs**-0.5


@dataclass(frozen=True, slots=True)
class GatedLayer:
    """A gated layer with random weights; x [T, D], pages [M, H, 2, R, K]."""

    spec: Spec
    norm: Tensor
    query: Tensor
    output: Tensor
    up: Tensor
    down: Tensor
    gate: Tensor

    @classmethod
    def random(cls, spec: Spec, device: torch.device) -> GatedLayer:
        dim, inner, ffn = spec.dim, spec.media_inner, spec.ffn_dim
        return cls(
            spec=spec,
            norm=torch.ones(dim, device=device, dtype=DTYPE),
            query=weight(inner, dim, device),
            output=weight(dim, inner, device),
            up=weight(ffn, dim, device),
            down=weight(dim, ffn, device),
            gate=torch.full((1,), 0.5, device=device, dtype=DTYPE),
        )

    def attend(self, query: Tensor, pages: Tensor, slots: Tensor, tiles: Tensor | None) -> Tensor:
        query = query.view(len(query), self.spec.media_heads, self.spec.media_head_dim)
        out = media_attention(query, pages, slots, scale=self.spec.media_head_dim**-0.5, plan=tiles)
        return out.flatten(1)

    def plain(self, x: Tensor, pages: Tensor, slots: Tensor, tiles: Tensor | None) -> Tensor:
        """Compute the layer as in the figure of the Flamingo paper, with separate gates."""
        h = self.attend(layer_norm(x, self.norm, self.norm, EPS) @ self.query.T, pages, slots, tiles)
        x = gated_residual(x, h @ self.output.T, self.gate)
        h = F.gelu(layer_norm(x, self.norm, self.norm, EPS) @ self.up.T)
        return gated_residual(x, h @ self.down.T, self.gate)

    def folded(self, x: Tensor, pages: Tensor, slots: Tensor, tiles: Tensor | None) -> Tensor:
        """Compute the layer with tanh(gate) folded into `output` and `down`, so that cuBLAS adds the residual."""
        h = self.attend(layer_norm(x, self.norm, self.norm, EPS) @ self.query.T, pages, slots, tiles)
        x = torch.addmm(x, h, self.output.T)
        return torch.addmm(x, F.gelu(layer_norm(x, self.norm, self.norm, EPS) @ self.up.T), self.down.T)


def measure_layer(report: Report, watch: Stopwatch, sizes: Sizes, machine: Machine) -> None:
    for spec in sizes.models:
        layer = GatedLayer.random(spec, watch.device)
        weights = layer.query.numel() + layer.output.numel() + layer.up.numel() + layer.down.numel()
        for num_tokens, run in [(n, 1) for n in sizes.decode] + [(n, sizes.shot_tokens) for n in sizes.prefill]:
            pages = -(-num_tokens // run)
            shape = (pages, spec.media_heads, 2, spec.num_latents, spec.media_head_dim)
            kv = torch.randn(shape, device=watch.device, dtype=DTYPE)
            slots = torch.arange(pages, dtype=torch.int32, device=watch.device).repeat_interleave(run)[:num_tokens]
            x = torch.randn(num_tokens, spec.dim, device=watch.device, dtype=DTYPE)
            inputs = (x, kv, slots, device_tiles(slots, spec.media_head_dim, DTYPE))
            bound = machine.bound(2.0 * (weights + kv.numel() + 2 * x.numel()), 2.0 * weights * num_tokens)
            case = f"{spec.name}, {num_tokens} tokens"
            variants = {"gates separate": partial(layer.plain, *inputs), "gates folded": partial(layer.folded, *inputs)}
            for name, call in variants.items():
                report.timed(STAGE, case, name, bound, partial(watch.time, [call]))
