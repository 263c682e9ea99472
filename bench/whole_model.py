"""The measurements of stages 4 to 6 of `python -m kernels.bench`, with the production code and random weights.

A decode step is the one that the engine records and replays: its static batch, plans, graphs and greedy tokens. The time to
the first token includes the encoder, the projection to pages and the forward of a prompt, with the plans that the host
builds.
Nothing here needs the packages of the server.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.published_models import CONFIGS, random_weights
from kernels.backend import use_triton
from kernels.bench.correctness import device_tiles
from kernels.bench.measure import Result, Stopwatch
from kernels.bench.sizes import Sizes, Spec
from kernels.bench.tuning import BLOCK_SIZE, block_table
from kernels.bench.whole_model import GATES, PROJECTED, WRITTEN
from kernels.media_attention_gpu import media_tiles
from kernels.paged_plan import TileShape, plan_tiles, static_plan
from kernels.rows import greedy_argmax_reference
from model.batch import Batch, KVCache, MediaPages
from model.flamingo import GatedCrossAttention, MediaCrossAttention
from model.inference import InferenceModel, prepare_for_inference
from model.vision import normalise
from server.engine.device.graphs import CudaRecorder, DecodeGraphs, Outputs, Step, static_batch
from server.engine.device.transfers import upload

DTYPE = torch.bfloat16
# the images that are encoded, and those that are projected, by the contents of the caches
ALL, ONE, NONE = "all", "one", "none"
LADDER = {
    "nothing cached": (ALL, ALL),
    "visual tokens cached": (NONE, ALL),
    "visual tokens and pages cached": (NONE, NONE),
    "all but a new image cached": (ONE, ONE),
}


def measure_layer(watch: Stopwatch, sizes: Sizes, *, spec: str, num_tokens: int, run: int, name: str) -> Result:
    of, config = sizes.spec(spec), CONFIGS[spec]
    gated = GatedCrossAttention(config.gated, of.dim, of.media_dim).to(watch.device, DTYPE).requires_grad_(False)
    for gate in (gated.attn_gate, gated.ffw_gate):
        assert gate is not None
        gate.fill_(0.5)
    if name == GATES[0]:
        gated.fold_gates()
    num_pages = -(-num_tokens // run)
    page = (of.media_heads, 2, of.num_latents, of.media_head_dim)
    pages = torch.randn(num_pages, *page, device=watch.device, dtype=DTYPE)
    slots = torch.arange(num_pages, dtype=torch.int32).repeat_interleave(run)[:num_tokens].to(watch.device)
    x = torch.randn(num_tokens, of.dim, device=watch.device, dtype=DTYPE)
    tiles = device_tiles(slots, of.media_head_dim, DTYPE)
    weights = sum(
        layer.weight.numel()
        for layer in (gated.attention.query, gated.attention.output, gated.feed_forward.up, gated.feed_forward.down)
    )
    timing = watch.time([partial(gated, x, pages, slots, tiles)])
    return Result.of(timing, 2.0 * (weights + pages.numel() + 2 * x.numel()), 2.0 * weights * num_tokens)


@dataclass(frozen=True, slots=True)
class Served:
    """A model with random weights, and caches with random content, as a runner has them."""

    spec: Spec
    model: InferenceModel
    kv: KVCache
    pages: MediaPages
    suppressed: Tensor  # ids that are never chosen
    device: torch.device

    @classmethod
    def random(cls, spec: Spec, device: torch.device, num_blocks: int, num_pages: int) -> Served:
        model = prepare_for_inference(random_weights(CONFIGS[spec.name], device, DTYPE))
        config = model.flamingo.config
        kv = KVCache.zeros(config, num_blocks, BLOCK_SIZE, DTYPE, device)
        pages = MediaPages.zeros(config, num_pages, DTYPE, device)
        for cache in (kv.blocks, pages.pages):
            for part in cache:
                part.normal_()
        return cls(spec, model, kv, pages, torch.zeros(1, dtype=torch.int64, device=device), device)

    @property
    def shape(self) -> TileShape:
        return TileShape(BLOCK_SIZE, 1, self.spec.head_dim, DTYPE)

    def tile_media(self, slots: Tensor) -> Tensor:
        return media_tiles(slots, self.spec.media_head_dim, DTYPE)

    def forward(self, batch: Batch) -> Outputs:
        """Return the logits, and of each row the most likely token and whether it is finite."""
        logits = self.model.flamingo(batch, self.kv, self.pages)
        return logits, *greedy_argmax_reference(logits, self.suppressed)

    def batch(self, table: Tensor, context: int, new_tokens: int, slots: Tensor) -> Batch:
        """Return the batch, on the host, of sequences of `context` tokens of which the last `new_tokens` are computed."""
        num_sequences = len(table)
        positions = torch.arange(context - new_tokens, context)
        starts = torch.arange(num_sequences + 1, dtype=torch.int32) * new_tokens
        slot_mapping = table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        batch = Batch(
            token_ids=torch.randint(self.spec.vocab_size, (num_sequences * new_tokens,)),
            positions=positions.repeat(num_sequences),
            media_slot=slots,
            query_starts=starts,
            last_token=starts[1:].long() - 1,
            context_lengths=torch.full((num_sequences,), context, dtype=torch.int32),
            block_table=table,
            slot_mapping=slot_mapping.flatten(),
        )
        return self._planned(batch)

    def _planned(self, batch: Batch) -> Batch:
        if not use_triton(self.kv.blocks):
            return batch
        assert batch.block_table is not None
        assert batch.context_lengths is not None
        assert batch.media_slot is not None
        num_tokens = len(batch.token_ids)
        tables = (batch.block_table, batch.query_starts, batch.context_lengths)
        plan = plan_tiles(*tables, num_tokens=num_tokens, shape=self.shape)
        return replace(batch, plan=plan, media_plan=self.tile_media(batch.media_slot))


class RecordedStep:
    """A decode step that is recorded as the engine records it; on a CPU, it runs instead of being replayed."""

    def __init__(self, served: Served, table: Tensor, context: int) -> None:
        num_rows, width = table.shape
        largest = static_batch(num_rows, width, BLOCK_SIZE)
        if use_triton(served.kv.blocks):
            tiles = torch.zeros(num_rows, 4, dtype=torch.int32)
            largest = replace(largest, plan=static_plan(num_rows, width, served.shape), media_plan=tiles)
        self._record = CudaRecorder() if served.device.type == "cuda" else None
        self._graphs = DecodeGraphs(
            served.forward, self._recorded, [num_rows], largest, served.device, served.tile_media
        )
        self._batch = served.batch(table, context, 1, torch.arange(num_rows, dtype=torch.int32))
        self.write_and_replay()

    def _recorded(self, step: Step) -> Step:
        self.replay = step if self._record is None else self._record(step)
        return self.replay

    def write_and_replay(self) -> Outputs:
        return self._graphs.run(self._batch)


def measure_step(watch: Stopwatch, sizes: Sizes, *, spec: str, sequences: int, is_shared: bool, name: str) -> Result:
    of, table = sizes.spec(spec), block_table(sizes, sequences, is_shared=is_shared)
    served = Served.random(of, watch.device, int(table.max()) + 1, sequences)
    num_tokens = sizes.shared_tokens + sequences * sizes.query_tokens if is_shared else sequences * sizes.context
    num_bytes = 2.0 * of.step_params + num_tokens * of.text_bytes + sequences * of.media_bytes
    flops = 2.0 * of.step_params * sequences
    if name != PROJECTED:
        step = RecordedStep(served, table, sizes.context)
        run = step.write_and_replay if name == WRITTEN else step.replay
        return Result.of(watch.time([run], graph=False), num_bytes, flops)
    images = torch.randn(sequences, sizes.images * of.num_latents, of.media_dim, device=watch.device, dtype=DTYPE)
    with patch.object(MediaCrossAttention, "forward", _attends_to(images, of.num_latents)):
        step = RecordedStep(served, table, sizes.context)
        return Result.of(watch.time([step.replay], graph=False), num_bytes, flops)


def _attends_to(images: Tensor, num_latents: int) -> Any:
    """Return a forward without a cache: project all images [S, T * R, Dv] of each sequence, and mask all but the last."""

    def forward(self: MediaCrossAttention, x: Tensor, *cached: Any) -> Tensor:
        key, value = self.key_value(images).unflatten(-1, (2, -1, self.head_dim)).unbind(2)  # [S, N, H, K]
        query = _normed(self.query_norm, self.query(x).unflatten(-1, (-1, self.head_dim)))  # [S, H, K]
        is_last = torch.arange(key.shape[1], device=x.device) >= key.shape[1] - num_latents
        attended = F.scaled_dot_product_attention(
            query[:, :, None],
            _normed(self.key_norm, key).transpose(1, 2),
            value.transpose(1, 2),
            is_last.expand(len(images), 1, 1, -1),
        )
        return self.output(attended.flatten(1))

    return forward


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def measure_first_token(watch: Stopwatch, sizes: Sizes, *, spec: str, name: str) -> Result:
    of, table = sizes.spec(spec), block_table(sizes, 1, is_shared=False)
    served = Served.random(of, watch.device, int(table.max()) + 1, sizes.images)
    counts = {ALL: sizes.images, ONE: 1, NONE: 0}
    num_encoded, num_projected = (counts[part] for part in LADDER[name])
    num_tokens = sizes.query_tokens if num_encoded == 1 else sizes.context
    call = partial(_first_token, served, sizes, table, num_encoded, num_projected, num_tokens)
    timing = watch.time([call], graph=False)
    # FLOPs of the language model alone: a lower bound, and a loose one if images are encoded
    return Result.of(timing, 2.0 * of.step_params, 2.0 * of.step_params * num_tokens)


def _first_token(
    served: Served, sizes: Sizes, table: Tensor, num_encoded: int, num_projected: int, num_tokens: int
) -> Tensor:
    model, spec, config = served.model, served.spec, served.model.flamingo.config
    if num_projected:
        visual_tokens = torch.zeros(num_projected, spec.num_latents, spec.media_dim, dtype=DTYPE)
        if num_encoded:
            side = config.vision.image_size
            (frames,) = upload([torch.zeros(num_encoded, side, side, 3, dtype=torch.uint8)], served.device)
            pixels = normalise(frames, config.vision).to(DTYPE)
            visual_tokens = model.flamingo.resampler(model.flamingo.features(pixels[:, None]))
        else:
            (visual_tokens,) = upload([visual_tokens], served.device)
        served.pages.pages[-num_projected:] = model.project_media(visual_tokens)
    shots = torch.arange(sizes.context) // sizes.shot_tokens
    slots = shots.clamp(max=sizes.shots).to(torch.int32)[-num_tokens:]
    batch = served.batch(table, sizes.context, num_tokens, slots)
    if served.device.type != "cpu":
        batch = batch.with_tensors(upload(batch.tensors, served.device))
    return served.forward(batch)[1]
