"""Stages 5 and 6, a whole model of random weights: one decode step, and the way to the first token.

The language model is MPT's shape (ALiBi, no biases). The step is what a server replays: all layers, the logits, the
choice of a token; nothing of it waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_triton
from kernels.bench.correctness import device_tiles
from kernels.bench.layer import DTYPE, EPS, GatedLayer, weight
from kernels.bench.machine import Machine
from kernels.bench.measure import Report, Stopwatch
from kernels.bench.sizes import Sizes, Spec
from kernels.kv_store import kv_store
from kernels.norm import layer_norm
from kernels.paged_attention import Plan, paged_attention, paged_plan

STEP, FIRST_TOKEN = "5 decode step", "6 first token"
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Tensor
    output: Tensor
    up: Tensor
    down: Tensor
    gated: GatedLayer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """One step's batch; `images` [S * T * R, Dv] only for the way that projects them anew at every step."""

    token_ids: Tensor
    slots: Tensor
    tiles: Tensor | None
    block_table: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    slot_mapping: Tensor
    num_shared_blocks: int
    plan: Plan | None
    kv_cache: Tensor  # [L, N, 2, H, B, K]
    pages: Tensor  # [M, X, H, 2, R, K]
    last: Tensor  # rows whose logits are wanted
    images: Tensor | None = None


class Model:
    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.norm = torch.ones(spec.dim, device=device, dtype=DTYPE)
        self.embed = weight(spec.vocab_size, spec.dim, device)
        self.layers = [self._layer(i) for i in range(spec.num_layers)]
        self.to_kv = weight(2 * spec.media_inner, spec.media_dim, device)
        self.slopes = 2.0 ** -(8 * (torch.arange(spec.num_heads, device=device) + 1) / spec.num_heads)

    def _layer(self, index: int) -> Layer:
        dim, ffn = self.spec.dim, self.spec.ffn_dim
        return Layer(
            qkv=weight(3 * dim, dim, self.device),
            output=weight(dim, dim, self.device),
            up=weight(ffn, dim, self.device),
            down=weight(dim, ffn, self.device),
            gated=GatedLayer.random(self.spec, self.device) if (index + 1) % self.spec.interval == 0 else None,
        )

    def _text(self, layer: Layer, index: int, x: Tensor, inputs: Inputs) -> Tensor:
        heads, head_dim = self.spec.num_heads, self.spec.head_dim
        qkv = (layer_norm(x, self.norm, None, EPS) @ layer.qkv.T).view(len(x), 3 * heads, head_dim)
        query, key, value = qkv.split(heads, 1)
        kv_store(key, value, inputs.kv_cache[index], inputs.slot_mapping)
        h = paged_attention(
            query, inputs.kv_cache[index], inputs.block_table, inputs.query_starts, inputs.context_lengths,
            scale=head_dim**-0.5, alibi_slopes=self.slopes, num_shared_blocks=inputs.num_shared_blocks,
            plan=inputs.plan,
        )  # fmt: skip
        x = torch.addmm(x, h.flatten(1), layer.output.T)
        return torch.addmm(x, F.gelu(layer_norm(x, self.norm, None, EPS) @ layer.up.T), layer.down.T)

    def _projected_anew(self, gated: GatedLayer, x: Tensor, images: Tensor) -> Tensor:
        """Without a cache of the media: keys and values of all images of each sequence, and a mask that leaves one."""
        spec, num_sequences = self.spec, len(x)
        kv = (images @ self.to_kv.T).view(num_sequences, -1, 2, spec.media_heads, spec.media_head_dim)
        key, value = kv.transpose(1, 3).unbind(2)  # [S, H, T * R, K]
        query = (layer_norm(x, self.norm, self.norm, EPS) @ gated.query.T).view(num_sequences, spec.media_heads, 1, -1)
        places = torch.arange(key.shape[2], device=x.device)
        mask = (places >= key.shape[2] - spec.num_latents).expand(num_sequences, 1, 1, -1)
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=spec.media_head_dim**-0.5)
        return out.flatten(1)

    def forward(self, inputs: Inputs) -> Tensor:
        x = F.embedding(inputs.token_ids, self.embed)
        gated_index = 0
        for index, layer in enumerate(self.layers):
            if layer.gated is not None and inputs.images is not None:
                h = self._projected_anew(layer.gated, x, inputs.images)
                x = torch.addmm(x, h, layer.gated.output.T)
                up = F.gelu(layer_norm(x, self.norm, self.norm, EPS) @ layer.gated.up.T)
                x = torch.addmm(x, up, layer.gated.down.T)
            elif layer.gated is not None:
                x = layer.gated.folded(x, inputs.pages[:, gated_index], inputs.slots, inputs.tiles)
                gated_index += 1
            x = self._text(layer, index, x, inputs)
        x = layer_norm(x[inputs.last], self.norm, None, EPS)
        return (x @ self.embed.T).argmax(-1)


def make_inputs(
    model: Model, sizes: Sizes, num_sequences: int, new_tokens: int, context: int, *, shared: bool
) -> Inputs:
    """Sequences of `context` tokens, the last `new_tokens` of them in this step; shared: one support set for all."""
    spec, device = model.spec, model.device
    per_sequence = -(-context // BLOCK_SIZE)
    common = sizes.shared_tokens // BLOCK_SIZE if shared else 0
    own = per_sequence - common
    table = torch.cat(
        [
            torch.arange(common).expand(num_sequences, -1),
            common + torch.arange(num_sequences * own).view(num_sequences, own),
        ],
        1,
    ).to(device, torch.int32)
    places = torch.arange(context - new_tokens, context, device=device)
    mapping = (table[:, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE).flatten()
    starts = torch.arange(num_sequences + 1, device=device, dtype=torch.int32) * new_tokens
    lengths = torch.full((num_sequences,), context, device=device, dtype=torch.int32)
    rows = num_sequences * new_tokens
    num_pages = sizes.images if new_tokens > 1 else num_sequences
    slots = (torch.arange(rows, device=device) * num_pages // rows).to(torch.int32)
    shape = (spec.num_layers, common + num_sequences * own, 2, spec.num_heads, BLOCK_SIZE, spec.head_dim)
    page = (num_pages, spec.gated_layers, spec.media_heads, 2, spec.num_latents, spec.media_head_dim)
    plan = None
    if use_triton(slots):
        plan = paged_plan(
            starts.cpu(), lengths.cpu(), rows, group=1, head_dim=spec.head_dim, dtype=DTYPE, shared=common > 0
        ).to(device)
    return Inputs(
        token_ids=torch.randint(spec.vocab_size, (rows,), device=device),
        slots=slots,
        tiles=device_tiles(slots, spec.media_head_dim, DTYPE),
        block_table=table,
        query_starts=starts,
        context_lengths=lengths,
        slot_mapping=mapping,
        num_shared_blocks=common if num_sequences > 1 else 0,
        plan=plan,
        kv_cache=torch.randn(shape, device=device, dtype=DTYPE),
        pages=torch.randn(page, device=device, dtype=DTYPE),
        last=starts[1:].long() - 1,
    )


def _floor(machine: Machine, spec: Spec, sizes: Sizes, num_sequences: int, *, shared: bool) -> float:
    own = sizes.own_tokens + (0 if shared else sizes.shared_tokens)
    text = (num_sequences * own + (sizes.shared_tokens if shared else 0)) * spec.text_bytes
    num_bytes = 2.0 * spec.step_params + text + num_sequences * spec.media_bytes
    return machine.floor(num_bytes, 2.0 * spec.step_params * num_sequences)


def measure_step(report: Report, watch: Stopwatch, sizes: Sizes, machine: Machine) -> None:
    context = sizes.shared_tokens + sizes.own_tokens
    for spec in sizes.models:
        model = Model(spec, watch.device)
        for num_sequences in sizes.step:
            for shared in (True, False):
                inputs = make_inputs(model, sizes, num_sequences, 1, context, shared=shared)
                floor = _floor(machine, spec, sizes, num_sequences, shared=shared)
                what = f"{spec.name}, {num_sequences} sequences of {context}"
                who = "ours, support set shared" if shared else "ours, each its own"
                report.timed(STEP, what, who, floor, partial(watch.time, [partial(model.forward, inputs)]))
        images = torch.randn(
            inputs.pages.shape[0] * sizes.images * spec.num_latents, spec.media_dim, device=watch.device, dtype=DTYPE
        )
        anew = partial(model.forward, replace(inputs, images=images))
        report.timed(STEP, what, "media projected at every step", floor, partial(watch.time, [anew]))


@dataclass(frozen=True, slots=True)
class Vision:
    """A Vision Transformer and a resampler by their products: what an image costs before its pages exist."""

    blocks: list[Tensor]
    num_heads: int
    tokens: int

    @classmethod
    def random(cls, spec: Spec, sizes: Sizes, device: torch.device) -> Vision:
        dim = spec.media_dim
        shapes = [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)] * sizes.vision_layers
        return cls([weight(*shape, device) for shape in shapes], max(dim // 64, 1), sizes.vision_tokens)

    def encode(self, images: int) -> Tensor:
        """[images * tokens, Dv]"""
        first = self.blocks[0]
        dim = first.shape[1]
        x = torch.zeros(images, self.tokens, dim, device=first.device, dtype=DTYPE)
        for qkv, output, up, down in zip(*(self.blocks[i::4] for i in range(4)), strict=True):
            query, key, value = (
                part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (x @ qkv.T).chunk(3, 2)
            )
            x = x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2) @ output.T
            x = x + F.gelu(x @ up.T) @ down.T
        return x.flatten(0, 1)


def _first_token(model: Model, vision: Vision, inputs: Inputs, *, encoded: int, projected: int) -> Tensor:
    if encoded:
        vision.encode(encoded)
    if projected:
        tokens = torch.zeros(projected * model.spec.num_latents, model.spec.media_dim, device=model.device, dtype=DTYPE)
        for _ in range(model.spec.gated_layers):
            tokens @ model.to_kv.T
    return model.forward(inputs)


def measure_first_token(report: Report, watch: Stopwatch, sizes: Sizes, machine: Machine) -> None:
    context = sizes.shared_tokens + sizes.own_tokens
    for spec in sizes.models:
        model, vision = Model(spec, watch.device), Vision.random(spec, sizes, watch.device)
        whole = make_inputs(model, sizes, 1, context, context, shared=False)
        own = make_inputs(model, sizes, 1, sizes.own_tokens, context, shared=False)
        ladder = {
            "nothing cached": partial(_first_token, encoded=sizes.images, projected=sizes.images, inputs=whole),
            "images' tokens cached": partial(_first_token, encoded=0, projected=sizes.images, inputs=whole),
            "and their pages": partial(_first_token, encoded=0, projected=0, inputs=whole),
            "and the text; a new image": partial(_first_token, encoded=1, projected=1, inputs=own),
        }
        for who, rung in ladder.items():
            tokens = sizes.own_tokens if "text" in who else context
            floor = machine.floor(2.0 * spec.step_params, 2.0 * spec.step_params * tokens)
            call = partial(rung, model, vision)
            what = f"{spec.name}, {sizes.images} images, {context} tokens"
            report.timed(FIRST_TOKEN, what, who, floor, partial(watch.time, [call], graph=False))
