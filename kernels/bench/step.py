"""Stages 5 and 6: one decode step and the time to the first token of a whole model with random weights.

The language model has the shape of MPT (ALiBi, no biases). A step is the work that a server replays without waiting for the
host: all layers, the logits, and the selection of a token.
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
from kernels.paged_attention import paged_attention
from kernels.paged_plan import Plan, Shape, plan_tiles
from kernels.rows import layer_norm
from kernels.self_attention import kv_store

STEP, FIRST_TOKEN = "5 decode step", "6 first token"
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of a language model layer, with the gated layer before it, if any."""

    qkv: Tensor
    output: Tensor
    up: Tensor
    down: Tensor
    gated: GatedLayer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The batch of one step. `images` [S * T * R, Dv] is set only to project all images at every step."""

    token_ids: Tensor
    slots: Tensor
    tiles: Tensor | None
    block_table: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    slot_mapping: Tensor
    plan: Plan | None
    kv_cache: Tensor  # [L, N, 2, H, B, K]
    pages: Tensor  # [M, X, H, 2, R, K]
    last: Tensor  # rows whose logits are computed
    images: Tensor | None = None


class Model:
    """A model with random weights of the sizes of a `Spec`."""

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
            scale=head_dim**-0.5, alibi_slopes=self.slopes, plan=inputs.plan,
        )  # fmt: skip
        x = torch.addmm(x, h.flatten(1), layer.output.T)
        return torch.addmm(x, F.gelu(layer_norm(x, self.norm, None, EPS) @ layer.up.T), layer.down.T)

    def _project_and_attend(self, gated: GatedLayer, x: Tensor, images: Tensor) -> Tensor:
        """Attend without a media cache: project all images of each sequence, and mask all but the last one."""
        spec, num_sequences = self.spec, len(x)
        kv = (images @ self.to_kv.T).view(num_sequences, -1, 2, spec.media_heads, spec.media_head_dim)
        key, value = kv.transpose(1, 3).unbind(2)  # [S, H, T * R, K]
        query = (layer_norm(x, self.norm, self.norm, EPS) @ gated.query.T).view(num_sequences, spec.media_heads, 1, -1)
        positions = torch.arange(key.shape[2], device=x.device)
        mask = (positions >= key.shape[2] - spec.num_latents).expand(num_sequences, 1, 1, -1)
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=spec.media_head_dim**-0.5)
        return out.flatten(1)

    def forward(self, inputs: Inputs) -> Tensor:
        x = F.embedding(inputs.token_ids, self.embed)
        gated_index = 0
        for index, layer in enumerate(self.layers):
            if layer.gated is not None and inputs.images is not None:
                h = self._project_and_attend(layer.gated, x, inputs.images)
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
    """Build sequences of `context` tokens, of which this step computes the last `new_tokens`.

    `shared` means one support set for all sequences.
    """
    spec, device = model.spec, model.device
    num_blocks = -(-context // BLOCK_SIZE)
    num_shared_blocks = sizes.shared_tokens // BLOCK_SIZE if shared else 0
    num_own_blocks = num_blocks - num_shared_blocks
    table = torch.cat(
        [
            torch.arange(num_shared_blocks).expand(num_sequences, -1),
            num_shared_blocks + torch.arange(num_sequences * num_own_blocks).view(num_sequences, num_own_blocks),
        ],
        1,
    ).to(device, torch.int32)
    positions = torch.arange(context - new_tokens, context, device=device)
    mapping = (table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE).flatten()
    starts = torch.arange(num_sequences + 1, device=device, dtype=torch.int32) * new_tokens
    lengths = torch.full((num_sequences,), context, device=device, dtype=torch.int32)
    rows = num_sequences * new_tokens
    num_pages = sizes.images if new_tokens > 1 else num_sequences
    slots = (torch.arange(rows, device=device) * num_pages // rows).to(torch.int32)
    pool_size = num_shared_blocks + num_sequences * num_own_blocks
    shape = (spec.num_layers, pool_size, 2, spec.num_heads, BLOCK_SIZE, spec.head_dim)
    page = (num_pages, spec.gated_layers, spec.media_heads, 2, spec.num_latents, spec.media_head_dim)
    plan = None
    if use_triton(slots):
        plan = plan_tiles(
            table.cpu(), starts.cpu(), lengths.cpu(),
            num_tokens=rows, shape=Shape(BLOCK_SIZE, 1, spec.head_dim, DTYPE),
        )  # fmt: skip
        plan = plan.to(device).over(table, BLOCK_SIZE, None)
    return Inputs(
        token_ids=torch.randint(spec.vocab_size, (rows,), device=device),
        slots=slots,
        tiles=device_tiles(slots, spec.media_head_dim, DTYPE),
        block_table=table,
        query_starts=starts,
        context_lengths=lengths,
        slot_mapping=mapping,
        plan=plan,
        kv_cache=torch.randn(shape, device=device, dtype=DTYPE),
        pages=torch.randn(page, device=device, dtype=DTYPE),
        last=starts[1:].long() - 1,
    )


def _bound(machine: Machine, spec: Spec, sizes: Sizes, num_sequences: int, *, shared: bool) -> float:
    tokens_per_sequence = sizes.query_tokens + (0 if shared else sizes.shared_tokens)
    text = (num_sequences * tokens_per_sequence + (sizes.shared_tokens if shared else 0)) * spec.text_bytes
    num_bytes = 2.0 * spec.step_params + text + num_sequences * spec.media_bytes
    return machine.bound(num_bytes, 2.0 * spec.step_params * num_sequences)


def measure_step(report: Report, watch: Stopwatch, sizes: Sizes, machine: Machine) -> None:
    context = sizes.shared_tokens + sizes.query_tokens
    for spec in sizes.models:
        model = Model(spec, watch.device)
        for num_sequences in sizes.step:
            for shared in (True, False):
                inputs = make_inputs(model, sizes, num_sequences, 1, context, shared=shared)
                bound = _bound(machine, spec, sizes, num_sequences, shared=shared)
                case = f"{spec.name}, {num_sequences} sequences of {context}"
                name = "ours, shared support set" if shared else "ours, separate support sets"
                report.timed(STEP, case, name, bound, partial(watch.time, [partial(model.forward, inputs)]))
        images = torch.randn(
            inputs.pages.shape[0] * sizes.images * spec.num_latents, spec.media_dim, device=watch.device, dtype=DTYPE
        )
        reprojecting = partial(model.forward, replace(inputs, images=images))
        report.timed(STEP, case, "media projected at every step", bound, partial(watch.time, [reprojecting]))


@dataclass(frozen=True, slots=True)
class Vision:
    """The matrix products of a Vision Transformer and a resampler: the cost of encoding an image."""

    blocks: list[Tensor]
    num_heads: int
    tokens: int

    @classmethod
    def random(cls, spec: Spec, sizes: Sizes, device: torch.device) -> Vision:
        dim = spec.media_dim
        shapes = [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)] * sizes.vision_layers
        return cls([weight(*shape, device) for shape in shapes], max(dim // 64, 1), sizes.vision_tokens)

    def encode(self, images: int) -> Tensor:
        """Return the features of zero images, [images * tokens, Dv]."""
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
    context = sizes.shared_tokens + sizes.query_tokens
    for spec in sizes.models:
        model, vision = Model(spec, watch.device), Vision.random(spec, sizes, watch.device)
        whole = make_inputs(model, sizes, 1, context, context, shared=False)
        query = make_inputs(model, sizes, 1, sizes.query_tokens, context, shared=False)
        cases_of_cache = {
            "nothing cached": partial(_first_token, encoded=sizes.images, projected=sizes.images, inputs=whole),
            "visual tokens cached": partial(_first_token, encoded=0, projected=sizes.images, inputs=whole),
            "visual tokens and pages cached": partial(_first_token, encoded=0, projected=0, inputs=whole),
            "all but a new image cached": partial(_first_token, encoded=1, projected=1, inputs=query),
        }
        for name, run in cases_of_cache.items():
            tokens = sizes.query_tokens if run.keywords["inputs"] is query else context
            bound = machine.bound(2.0 * spec.step_params, 2.0 * spec.step_params * tokens)
            call = partial(run, model, vision)
            case = f"{spec.name}, {sizes.images} images, {context} tokens"
            report.timed(FIRST_TOKEN, case, name, bound, partial(watch.time, [call], graph=False))
