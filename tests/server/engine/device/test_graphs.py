"""Recorded decode steps change no answer. On a CPU, "recording" returns the step itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from model.batch import Batch
from model.config import AlonePositions
from server.engine.device.graphs import (
    CudaRecorder,
    DecodeGraphs,
    Step,
    bucket_sizes,
    fill,
    fill_tiles,
    first_rows,
    static_batch,
)
from server.engine.engine import Engine
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    IMAGES,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    served_model,
)
from tests.tiny_models import FAMILIES, Family, prompt_tokenizer


def test_buckets_cover_every_batch() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(4) == [1, 2, 4]
    assert bucket_sizes(20) == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize("alone_positions", ["restart", "in_a_row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_equal_the_reference(family: Family, alone_positions: AlonePositions) -> None:
    replays: list[int] = []

    def record(step: Step) -> Step:
        recorded_at = len(replays)

        def replay() -> None:
            replays.append(recorded_at)
            step()

        return replay

    config = replace(CONFIG, num_blocks=256)
    model = served_model(family, alone_positions)
    answer = Client(Engine(model, prompt_tokenizer(), config, record=record), dict(IMAGES))
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
        return static_batch(size, table_width, 16)

    graphs = DecodeGraphs(lambda batch: (batch.token_ids,), lambda step: step, [1, 2], step(2, 4), torch.device("cpu"))
    assert graphs.takes(step(2, 4))
    assert graphs.takes(step(1, 3))
    assert not graphs.takes(step(3, 4))
    assert not graphs.takes(step(2, 5))


def test_padding_stores_nothing_and_reads_nothing() -> None:
    buffers = static_batch(8, 4, 16)
    full = first_rows(buffers, 4)
    for tensor in (full.token_ids, full.media_slot, full.slot_mapping, full.block_table):
        assert tensor is not None
        tensor.fill_(7)
    single = static_batch(1, 2, 16)
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


def test_all_recorded_steps_share_one_pool_and_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made, captures = Counter[str](), list[tuple[str, str]]()
    replayed: list[int] = []

    class Stream:
        def __init__(self) -> None:
            made["streams"] += 1
            self.name = f"stream {made['streams']}"

        def wait_stream(self, other: Stream) -> None:
            assert other is not self

    class Graph:
        def __init__(self) -> None:
            self.number = len(captures)

        def replay(self) -> None:
            replayed.append(self.number)

    def pool() -> str:
        made["pools"] += 1
        return f"pool {made['pools']}"

    @contextmanager
    def capture(graph: Graph, pool: str, stream: Stream) -> Iterator[None]:
        captures.append((pool, stream.name))
        yield

    current = Stream()
    for name, fake in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": pool,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: current,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs = DecodeGraphs(
        lambda batch: (batch.token_ids,), CudaRecorder(), bucket_sizes(20), static_batch(20, 4, 16), torch.device("cpu")
    )
    assert captures == [("pool 1", "stream 2")] * len(bucket_sizes(20))
    graphs.run(static_batch(3, 2, 16))
    assert replayed == [bucket_sizes(20)[::-1].index(4)]


def test_all_recorded_steps_write_one_set_of_outputs() -> None:
    graphs = DecodeGraphs(
        lambda batch: (batch.token_ids + 1,), lambda step: step, [1, 2, 4], static_batch(4, 4, 16), torch.device("cpu")
    )
    steps = [static_batch(size, 4, 16) for size in (4, 1, 3)]
    for step in steps:
        step.token_ids.copy_(torch.arange(len(step.token_ids)) + len(step.token_ids))
    outputs = [graphs.run(step)[0] for step in steps]
    assert [len(output) for output in outputs] == [4, 1, 3]
    assert len({output.data_ptr() for output in outputs}) == 1
    assert outputs[-1].tolist() == [4, 5, 6]


def test_tiles_of_an_earlier_step_are_not_left() -> None:
    static = torch.full((4, 4), 7, dtype=torch.int32)
    fill_tiles(static, torch.tensor([[0, 2, 5, 0], [2, 2, -1, 0]], dtype=torch.int32))
    assert static.tolist() == [[0, 2, 5, 0], [2, 2, -1, 0], [0] * 4, [0] * 4]
