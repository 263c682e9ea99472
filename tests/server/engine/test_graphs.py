"""Recorded decode steps change no answer. On a CPU, "recording" returns the step itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.batch import Batch
from server.engine.engine import Engine
from server.engine.graphs import DecodeGraphs, Step, bucket_sizes, fill, first_rows, static_batch
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    IMAGES,
    SERVED,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
)
from tests.tiny_models import FAMILIES, Family, prompt_tokenizer


def test_buckets_cover_every_batch() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(4) == [1, 2, 4]
    assert bucket_sizes(20) == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_equal_the_reference(family: Family) -> None:
    replays: list[int] = []

    def record(step: Step) -> Step:
        recorded_at = len(replays)

        def replay() -> torch.Tensor:
            replays.append(recorded_at)
            return step()

        return replay

    config = replace(CONFIG, num_blocks=256)
    answer = Client(Engine(SERVED[family], prompt_tokenizer(), config, record=record), dict(IMAGES))
    alone = [Prompt(((-1, 3), (i, 5), (i + 1, 4), (3, 2)), shots_attend="alone") for i in range(2)]
    # the last steps are of plain rows, where there were rows with spans
    prompts = [*alone, FEW_SHOT, *(Prompt(((i, 3 + i), (i + 1, 4))) for i in range(4))]
    for i, prompt in enumerate(prompts):
        answer.engine.add(prompt.request(str(i)))
        answer.step()
    answer.run()
    assert replays
    for i, prompt in enumerate(prompts):
        assert_equals_reference(family, prompt, answer, str(i))
    assert_all_released(answer.engine)


def test_steps_of_more_rows_or_wider_tables_were_not_recorded() -> None:
    def step(size: int, table_width: int) -> Batch:
        return static_batch(size, table_width, 16, torch.device("cpu"))

    graphs = DecodeGraphs(lambda batch: batch.token_ids, lambda step: step, [1, 2], step(2, 4))
    assert graphs.takes(step(2, 4))
    assert graphs.takes(step(1, 3))
    assert not graphs.takes(step(3, 4))
    assert not graphs.takes(step(2, 5))


def test_padding_stores_nothing_and_reads_nothing() -> None:
    buffers = static_batch(8, 4, 16, torch.device("cpu"))
    full = first_rows(buffers, 4)
    for tensor in (full.token_ids, full.media_slot, full.slot_mapping, full.block_table):
        assert tensor is not None
        tensor.fill_(7)
    single = static_batch(1, 2, 16, torch.device("cpu"))
    single.query_starts[1] = 1
    for tensor, value in ((single.slot_mapping, 5), (single.media_slot, 2)):
        assert tensor is not None
        tensor.fill_(value)
    fill(first_rows(buffers, 4), single)
    padded = first_rows(buffers, 4)
    assert padded.media_slot is not None
    assert padded.media_slot.tolist() == [2, -1, -1, -1]
    assert padded.slot_mapping is not None
    assert padded.slot_mapping.tolist() == [5, -1, -1, -1]
    assert padded.query_starts.tolist() == [0, 1, 1, 1, 1]
