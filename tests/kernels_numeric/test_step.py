"""Steps of a whole model with plans from the host: eager, and read by a recorded step from its buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.backend import select
from kernels.media_attention_gpu import media_tiles
from kernels.paged_plan import TileShape, static_plan
from model.batch import Batch, KVCache, MediaPages
from model.config import AlonePositions, LanguageModelConfig
from server.engine.device.graphs import DecodeGraphs, static_batch
from tests.span_steps import Row, Span, step_of
from tests.tiny_models import CONFIGS, Family, tiny_model, with_alone_positions

BLOCK_SIZE = 4
PREFIX, A, B = Span(0, 5, "prefix"), Span(5, 7, "a"), Span(5, 6, "b")


def batch_of(rows: list[Row], slots: list[int], text: LanguageModelConfig) -> tuple[Batch, Tensor]:
    """Return a batch of these rows, and the cache that they read, for one layer."""
    rotary_dim = text.rotary_dim if text.has_key_offsets else 0
    step = step_of(
        rows, heads=text.num_heads, kv_heads=text.num_kv_heads, head_dim=text.head_dim, rotary_dim=rotary_dim
    )
    at = torch.cat([torch.arange(row.num_queries) - row.num_queries for row in rows])
    sequence = torch.repeat_interleave(torch.arange(len(rows)), step.query_starts.diff().long())
    slot = step.context_lengths[sequence] + at
    blocks = step.block_table[sequence, slot // BLOCK_SIZE].long()
    batch = Batch(
        token_ids=torch.arange(len(at)),
        positions=step.spans.positions,
        media_slot=torch.tensor(slots, dtype=torch.int32),
        query_starts=step.query_starts,
        last_token=step.query_starts[1:].long() - 1,
        context_lengths=step.context_lengths,
        block_table=step.block_table,
        block_positions=step.spans.block_positions,
        block_lengths=step.spans.block_lengths,
        block_offsets=None if step.spans.offsets is None else step.spans.offsets.blocks,
        slot_mapping=blocks * BLOCK_SIZE + slot % BLOCK_SIZE,
    )
    return batch, step.kv_cache


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 1, 9)], ids=["decode", "mixed"])
@pytest.mark.parametrize("alone_positions", ["restart", "in_a_row"])
@pytest.mark.parametrize("family", ["openflamingo", "idefics"])
def test_a_step_equals_the_reference(family: Family, alone_positions: AlonePositions, counts: tuple[int, ...]) -> None:
    model = tiny_model(with_alone_positions(CONFIGS[family], alone_positions))
    config, text = model.config, model.config.language_model
    spans = [(PREFIX, A, Span(12, 3)), (PREFIX, A, B, Span(12, 2)), (Span(0, 9),)]
    rows = [Row(row, count) for row, count in zip(spans, counts, strict=True)]
    rows = [row.in_a_row() if alone_positions == "in_a_row" else row for row in rows]
    num_tokens = sum(counts)
    batch, kv_cache = batch_of(rows, [i % 3 - 1 for i in range(num_tokens)], text)
    pages = MediaPages(
        torch.randn(2, *MediaPages.zeros(config, 1, torch.float32, "cpu").pages.shape[1:]), config.gated_layers
    )

    def cache() -> KVCache:
        return KVCache(kv_cache.expand(config.language_model.num_layers, *kv_cache.shape).clone())

    select("reference")
    expected = model(batch, cache(), pages)
    select("auto")
    kv = cache()
    assert batch.media_slot is not None
    plan = model.language_model.plan(batch, kv.layer(0))
    planned = replace(batch, plan=plan, media_plan=media_tiles(batch.media_slot, config.gated.head_dim, torch.float32))
    torch.testing.assert_close(model(planned, cache(), pages), expected, atol=1e-4, rtol=1e-4)
    if max(counts) > 1:
        return
    largest = static_batch(4, 16, BLOCK_SIZE, has_offsets=text.has_key_offsets)
    shape = TileShape(BLOCK_SIZE, text.num_heads // text.num_kv_heads, text.head_dim, torch.float32)
    largest = replace(largest, plan=static_plan(4, 16, shape))
    graphs = DecodeGraphs(
        lambda static: (model(static, kv, pages),), lambda step: step, [2, 4], largest, torch.device("cpu")
    )
    torch.testing.assert_close(graphs.run(planned)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alone_positions", ["restart", "in_a_row"])
def test_proposed_tokens_that_are_runs_of_one_token_equal_one_run(alone_positions: AlonePositions) -> None:
    model = tiny_model(with_alone_positions(CONFIGS["openflamingo"], alone_positions))
    config, count = model.config, 3
    rows = [Row((PREFIX, A, Span(12, 6)), count), Row((Span(0, 9),), 1)]
    rows = [row.in_a_row() if alone_positions == "in_a_row" else row for row in rows]
    batch, kv_cache = batch_of(rows, [0, 0, 0, -1], config.language_model)
    batch = replace(batch, last_token=torch.arange(count + 1))
    sequence = torch.tensor([0] * count + [1])
    assert batch.context_lengths is not None
    assert batch.block_table is not None
    assert batch.block_positions is not None
    assert batch.block_lengths is not None
    runs = replace(
        batch,
        query_starts=torch.arange(count + 2, dtype=torch.int32),
        context_lengths=batch.context_lengths[sequence] - torch.tensor([2, 1, 0, 0], dtype=torch.int32),
        block_table=batch.block_table[sequence],
        block_positions=batch.block_positions[sequence],
        block_lengths=batch.block_lengths[sequence],
        block_offsets=None if batch.block_offsets is None else batch.block_offsets[sequence],
    )
    pages = MediaPages(
        torch.randn(1, *MediaPages.zeros(config, 1, torch.float32, "cpu").pages.shape[1:]), config.gated_layers
    )

    def cache() -> KVCache:
        return KVCache(kv_cache.expand(config.language_model.num_layers, *kv_cache.shape).clone())

    select("reference")
    expected = model(batch, cache(), pages)
    select("auto")
    torch.testing.assert_close(model(runs, cache(), pages), expected, atol=1e-4, rtol=1e-4)
