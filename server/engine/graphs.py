"""Records decode steps once and replays them: one graph per bucket of batch sizes, all on one set of static buffers.

A step of S sequences is copied into the first S rows of the next larger bucket; the rows after them are padding that
stores nothing, reads no media and attends to nothing. Recording is a function: `record_cuda` on a GPU, a stub in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch
from model.config import FlamingoConfig

Step = Callable[[], Tensor]
Recorder = Callable[[Step], Step]
NONE = -1  # no media slot, no cache slot


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


@dataclass(frozen=True, slots=True)
class Buffers:
    """Static tensors to which a step's integers are written before it is replayed; a bucket's batch is their first rows."""

    token_ids: Tensor
    positions: Tensor
    media_slot: Tensor
    query_starts: Tensor
    last_token: Tensor
    context_lengths: Tensor
    block_table: Tensor
    slot_mapping: Tensor

    @classmethod
    def empty(cls, size: int, table_width: int, device: torch.device) -> Buffers:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            token_ids=zeros(size, dtype=torch.int64),
            positions=zeros(size, dtype=torch.int64),
            media_slot=torch.full((size,), NONE, dtype=torch.int32, device=device),
            query_starts=zeros(size + 1, dtype=torch.int32),
            last_token=torch.arange(size, device=device),
            context_lengths=torch.ones(size, dtype=torch.int32, device=device),
            block_table=zeros(size, table_width, dtype=torch.int32),
            slot_mapping=torch.full((size,), NONE, dtype=torch.int64, device=device),
        )

    def batch(self, size: int) -> Batch:
        return Batch(
            token_ids=self.token_ids[:size],
            positions=self.positions[:size],
            media_slot=self.media_slot[:size],
            query_starts=self.query_starts[: size + 1],
            last_token=self.last_token[:size],
            context_lengths=self.context_lengths[:size],
            block_table=self.block_table[:size],
            slot_mapping=self.slot_mapping[:size],
        )

    def fill(self, batch: Batch, size: int) -> None:
        """Write a step of S <= `size` decoding sequences, followed by padding."""
        assert batch.context_lengths is not None
        assert batch.block_table is not None
        assert batch.slot_mapping is not None
        count, width = batch.block_table.shape
        self.token_ids[:count].copy_(batch.token_ids)
        self.positions[:count].copy_(batch.positions)
        if batch.media_slot is None:
            self.media_slot[:size].fill_(NONE)
        else:
            self.media_slot[:count].copy_(batch.media_slot)
            self.media_slot[count:size].fill_(NONE)
        self.query_starts[: count + 1].copy_(batch.query_starts)
        self.query_starts[count + 1 : size + 1].fill_(count)
        self.context_lengths[:count].copy_(batch.context_lengths)
        self.context_lengths[count:size].fill_(1)
        self.block_table[:count, :width].copy_(batch.block_table)
        self.slot_mapping[:count].copy_(batch.slot_mapping)
        self.slot_mapping[count:size].fill_(NONE)


class DecodeGraphs:
    """`forward` recorded for each bucket, the largest first so that the smaller ones fit into its memory."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        record: Recorder,
        sizes: Iterable[int],
        table_width: int,
        device: torch.device,
    ) -> None:
        ordered = sorted(sizes, reverse=True)
        self._buffers = Buffers.empty(ordered[0], table_width, device)
        self._steps = {size: record(self._step(forward, size)) for size in ordered}

    def _step(self, forward: Callable[[Batch], Tensor], size: int) -> Step:
        batch = self._buffers.batch(size)
        return lambda: forward(batch)

    def run(self, batch: Batch) -> Tensor:
        """Return logits [S, V] of a step in which each of S sequences has one token; they are valid until the next step."""
        count = len(batch.token_ids)
        size = min(size for size in self._steps if size >= count)
        self._buffers.fill(batch, size)
        return self._steps[size]()[:count]
