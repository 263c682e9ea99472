"""Decode steps that are recorded at start and replayed: each reads one batch of a fixed size, into which a step is written.

Launched one by one, the kernels of a decode step take the host longer than the GPU takes to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kernels.paged_plan import Plan, fill_plan, first_rows_of
from kernels.spans import plain_tables
from model.batch import Batch
from model.config import FlamingoConfig

Step = Callable[[], Tensor]
# turns a step into one that is replayed: `record_cuda` on a GPU, a stub in tests
Recorder = Callable[[Step], Step]
NONE = -1  # no media slot, no cache slot

# the tensors of a batch that have a row per sequence, and the values of padding where they matter
PADDING: dict[str, int | None] = {
    "token_ids": None,
    "positions": None,
    "media_slot": NONE,
    "context_lengths": 1,
    "block_table": None,
    "block_positions": None,
    "block_lengths": None,
    "slot_mapping": NONE,
}


class DecodeGraphs:
    """`forward` recorded for each bucket of batch sizes, the largest first so that the smaller ones fit into its memory.

    All are on one static batch. A step of S sequences is copied into the first S rows of the next larger bucket; the rows
    after them are padding that stores nothing, reads no media and attends to nothing.
    """

    def __init__(
        self, forward: Callable[[Batch], Tensor], record: Recorder, sizes: Iterable[int], largest: Batch
    ) -> None:
        assert largest.block_table is not None
        assert largest.block_positions is not None
        assert largest.block_lengths is not None
        self._max_rows, self._max_width = largest.block_table.shape
        self._plain_positions, self._plain_lengths = largest.block_positions.clone(), largest.block_lengths.clone()
        ordered = sorted(sizes, reverse=True)
        self._batches = {size: first_rows(largest, size) for size in ordered}
        self._steps = {size: record(partial(forward, batch)) for size, batch in self._batches.items()}

    def takes(self, batch: Batch) -> bool:
        """Return whether a step of one token per sequence was recorded: beams can be more, and spans fill more blocks."""
        assert batch.block_table is not None
        num_rows, width = batch.block_table.shape
        return num_rows <= self._max_rows and width <= self._max_width

    def run(self, batch: Batch) -> Tensor:
        """Return logits [S, V] of a step in which each of S sequences has one token; they are valid until the next step."""
        count = len(batch.token_ids)
        size = min(size for size in self._steps if size >= count)
        if batch.block_positions is None:
            positions, lengths = self._plain_positions[:count], self._plain_lengths[:count]
            batch = replace(batch, block_positions=positions, block_lengths=lengths)
        fill(self._batches[size], batch)
        return self._steps[size]()[:count]


def bucket_sizes(max_sequences: int) -> list[int]:
    """Return 1, 2, 4, 8, then every 8th, up to `max_sequences`."""
    sizes = [size for size in (1, 2, 4) if size < max_sequences]
    return [*sizes, *range(8, max_sequences, 8), max_sequences]


def can_be_recorded(config: FlamingoConfig) -> bool:
    """Return whether steps have a fixed shape: tokens that read all previous media read a varying number of pages."""
    return config.gated.attends == "last"


def record_cuda(step: Step) -> Step:
    """Run a step once for lazy compilation and once more into a graph; the replayed step returns the same tensor."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def static_batch(size: int, table_width: int, block_size: int, device: torch.device) -> Batch:
    """Return a batch of `size` rows of padding, to which a step's integers are written before it is replayed."""

    def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    table = full(0, size, table_width, dtype=torch.int32)
    block_positions, block_lengths = plain_tables(table, block_size)
    return Batch(
        token_ids=full(0, size),
        positions=full(0, size),
        media_slot=full(NONE, size, dtype=torch.int32),
        query_starts=full(0, size + 1, dtype=torch.int32),
        last_token=torch.arange(size, device=device),
        context_lengths=full(1, size, dtype=torch.int32),
        block_table=table,
        block_positions=block_positions,
        block_lengths=block_lengths,
        slot_mapping=full(NONE, size),
    )


def first_rows(batch: Batch, size: int) -> Batch:
    """Return a batch of views of the first rows of a static batch."""
    rows = {name: getattr(batch, name)[:size] for name in ("last_token", *PADDING)}
    plan = first_rows_of(batch.plan, size) if isinstance(batch.plan, Plan) else None
    return Batch(query_starts=batch.query_starts[: size + 1], plan=plan, **rows)


def fill(static: Batch, batch: Batch) -> None:
    """Write a step of S decoding sequences into a static batch of S rows or more, followed by padding."""
    count = len(batch.token_ids)
    for name, padding in PADDING.items():
        target, values = getattr(static, name), getattr(batch, name)
        if values is not None:
            target[tuple(map(slice, values.shape))].copy_(values)
        if padding is not None:
            target[0 if values is None else count :].fill_(padding)
    static.query_starts[: count + 1].copy_(batch.query_starts)
    static.query_starts[count + 1 :].fill_(count)
    if isinstance(static.plan, Plan) and isinstance(batch.plan, Plan):
        fill_plan(static.plan, batch.plan)
