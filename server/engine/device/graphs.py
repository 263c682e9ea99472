"""CUDA graphs of decode steps, recorded at startup: each replays a batch of a fixed size, into which a step is written.

Launched one by one, the kernels of a decode step take the host longer than the GPU takes to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from kernels.paged_plan import TilePlan, fill_plan, first_rows_of
from kernels.spans import plain_tables
from model.batch import Batch
from model.config import FlamingoConfig
from server.engine.device.transfers import Mirror

Outputs = tuple[Tensor, ...]  # [S, ..] each
Step = Callable[[], None]
# turns a step into one that is replayed: `CudaRecorder` on a GPU, a stand-in in tests
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
    "block_offsets": None,
    "slot_mapping": NONE,
}


class DecodeGraphs:
    """`forward` recorded for each bucket of batch sizes, the largest first so that the smaller ones fit into its memory.

    All are on one static batch. A step of S sequences is written into the first S rows of the next larger bucket, in memory
    of the host, which one copy brings to the device; the rows after them are padding that stores nothing, reads no media
    and attends to nothing. Two steps may be on their way: they are written into two sets of that memory in turn.
    `tile_media` makes a batch's plan of the media pages, if the static batch has one.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Outputs],
        record: Recorder,
        sizes: Iterable[int],
        largest: Batch,
        device: torch.device,
        tile_media: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        assert largest.block_table is not None
        assert largest.block_positions is not None
        assert largest.block_lengths is not None
        self._max_rows, self._max_width = largest.block_table.shape
        tables = (largest.block_positions, largest.block_lengths, largest.block_offsets)
        self._plain_tables = [None if table is None else table.clone() for table in tables]
        self._tile_media = tile_media
        self._mirror = mirror = Mirror(largest.tensors, device)
        on_device, ordered = largest.with_tensors(mirror.on_device), sorted(sizes, reverse=True)
        self._batches = [
            {size: first_rows(largest.with_tensors(tensors), size) for size in ordered} for tensors in mirror.on_host
        ]
        self._turns = cycle(range(len(self._batches)))
        self._token_ids = on_device.token_ids
        self._forward, self._outputs = forward, forward(on_device)
        self._steps = {size: record(partial(self._compute, first_rows(on_device, size))) for size in ordered}

    def _compute(self, batch: Batch) -> None:
        """Write the outputs into the first rows of those of the largest step: each step would keep memory for its own."""
        for target, output in zip(self._outputs, self._forward(batch), strict=True):
            target[: len(output)].copy_(output)

    def takes(self, batch: Batch) -> bool:
        """Return whether a step of these runs, of one token each, was recorded.

        Beams and proposed tokens can be more runs, and spans fill more blocks.
        """
        assert batch.block_table is not None
        num_rows, width = batch.block_table.shape
        return num_rows <= self._max_rows and width <= self._max_width

    def run(self, batch: Batch, token_ids: Tensor | None = None) -> Outputs:
        """Return the outputs for a step on the host, of S runs with one token each; they are valid until the next.

        `token_ids` [S] on the device take the place of those on the host.
        """
        count = len(batch.token_ids)
        size = min(size for size in self._steps if size >= count)
        if batch.block_positions is None:
            positions, lengths, offsets = (None if table is None else table[:count] for table in self._plain_tables)
            batch = replace(batch, block_positions=positions, block_lengths=lengths, block_offsets=offsets)
        turn = next(self._turns)
        static = self._batches[turn][size]
        fill(static, batch)
        if static.media_plan is not None and static.media_slot is not None and self._tile_media is not None:
            fill_tiles(static.media_plan, self._tile_media(static.media_slot))
        self._mirror.send(turn)
        if token_ids is not None:
            self._token_ids[:count].copy_(token_ids)
        self._steps[size]()
        return tuple(output[:count] for output in self._outputs)


def bucket_sizes(max_sequences: int) -> list[int]:
    """Return 1, 2, 4, 8, then every 8th, up to `max_sequences`."""
    sizes = [size for size in (1, 2, 4) if size < max_sequences]
    return [*sizes, *range(8, max_sequences, 8), max_sequences]


def can_be_recorded(config: FlamingoConfig) -> bool:
    """Return whether steps have a fixed shape: tokens that read all previous media read a varying number of pages."""
    return config.gated.attends == "last"


class CudaRecorder:
    """Records steps as CUDA graphs, in one stream and one pool of memory.

    All steps share the memory of the largest one and one workspace for the products.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Run a step once for lazy compilation and once more into a graph."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step()
        return graph.replay


def static_batch(size: int, table_width: int, block_size: int, *, has_offsets: bool = False) -> Batch:
    """Return a batch of `size` rows of padding, to which a step's integers are written before it is replayed."""

    def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    table = full(0, size, table_width, dtype=torch.int32)
    block_positions, block_lengths = plain_tables(table, block_size)
    return Batch(
        token_ids=full(0, size),
        positions=full(0, size),
        media_slot=full(NONE, size, dtype=torch.int32),
        query_starts=full(0, size + 1, dtype=torch.int32),
        last_token=torch.arange(size),
        context_lengths=full(1, size, dtype=torch.int32),
        block_table=table,
        block_positions=block_positions,
        block_lengths=block_lengths,
        block_offsets=torch.zeros_like(table) if has_offsets else None,
        slot_mapping=full(NONE, size),
    )


def first_rows(batch: Batch, size: int) -> Batch:
    """Return a batch of views of the first rows of a static batch."""
    tensors = {name: getattr(batch, name) for name in ("last_token", *PADDING)}
    rows = {name: tensor[:size] for name, tensor in tensors.items() if tensor is not None}
    plan = first_rows_of(batch.plan, size) if isinstance(batch.plan, TilePlan) else None
    media_plan = None if batch.media_plan is None else batch.media_plan[:size]
    return Batch(query_starts=batch.query_starts[: size + 1], plan=plan, media_plan=media_plan, **rows)


def fill(static: Batch, batch: Batch) -> None:
    """Write a step of S decoding sequences into a static batch of S rows or more, followed by padding."""
    count = len(batch.token_ids)
    for name, padding in PADDING.items():
        target, values = getattr(static, name), getattr(batch, name)
        if target is None:
            continue
        if values is not None:
            target[tuple(map(slice, values.shape))].copy_(values)
        if padding is not None:
            target[0 if values is None else count :].fill_(padding)
    static.query_starts[: count + 1].copy_(batch.query_starts)
    static.query_starts[count + 1 :].fill_(count)
    if isinstance(static.plan, TilePlan) and isinstance(batch.plan, TilePlan):
        fill_plan(static.plan, batch.plan)


def fill_tiles(static: Tensor, tiles: Tensor) -> None:
    """Write the tiles of media attention into a static table, followed by tiles of no rows."""
    static[: len(tiles)].copy_(tiles)
    static[len(tiles) :].fill_(0)
