"""Estimates decode steps on an H100 and compares them with a lower bound: `python -m bench.floors`. Nothing is measured.

The step that a GPU replays runs on the meta device (`bench.nodes`), and the bytes and FLOPs of each node are counted. A
node takes the time of a launch, plus that of its bytes or its FLOPs, whichever is longer. The floor, or lower bound, is the
time to read the weights and the keys and values of each token and image once, and to compute their FLOPs. The constants
were fixed before any measurement; the first one will test them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.nodes import DTYPE, Nodes, run_step
from bench.options import as_settings, parse
from bench.published_models import PUBLISHED, SPECS
from bench.table import Bar, Report, format_table
from kernels import backend
from kernels.bench.sizes import FULL, Spec
from kernels.bench.tuning import BLOCK_SIZE, block_table
from kernels.paged_plan import Tiles, TileShape, plan_tiles

QUICK = {"models": ["OF-3B"], "sequences": [1]}
SIZES = FULL  # 32 shots of 30 tokens, which all sequences share, and 20 tokens of a query
MOST_EXPENSIVE = 8
# floor / estimate that a step should reach, by the number of sequences
AIMS = {1: 0.80, 64: 0.85}


class Constant(NamedTuple):
    """A constant on which the estimate is based."""

    name: str
    value: float
    unit: str
    source: str


BANDWIDTH = Constant("bandwidth", 3.0e12, "bytes/s", "reached on an H100 SXM; 3.35e12 on its data sheet")
FLOPS = Constant("products", 800e12, "FLOP/s", "large bfloat16 products of cuBLAS on an H100; 989e12 on its data sheet")
NODE = Constant("node", 2e-6, "s", "of a graph: launch, a round trip to memory, the end of the last program")
CONSTANTS = (BANDWIDTH, FLOPS, NODE)


@dataclass(slots=True)
class NodeCost:
    """The bytes and FLOPs of the nodes of one name. `repeated` bytes are read again, and L2 may serve them."""

    name: str
    nodes: int = 0
    num_bytes: float = 0.0
    flops: float = 0.0
    repeated: float = 0.0
    seconds: float = 0.0
    seconds_without_l2: float = 0.0

    def add(self, num_bytes: float, flops: float = 0.0, repeated: float = 0.0) -> None:
        self.nodes += 1
        self.num_bytes += num_bytes
        self.flops += flops
        self.repeated += repeated
        self.seconds += node_seconds(num_bytes, flops)
        self.seconds_without_l2 += node_seconds(num_bytes + repeated, flops)


def node_seconds(num_bytes: float, flops: float) -> float:
    return NODE.value + max(num_bytes / BANDWIDTH.value, flops / FLOPS.value)


class Costs(Nodes):
    """Counts the nodes of a step of sequences that share their shots, with the bytes and FLOPs of each."""

    def __init__(self, spec: Spec, num_sequences: int, reads: Reads) -> None:
        super().__init__()
        self.works: dict[str, NodeCost] = {}
        self._spec, self._num_sequences, self._reads = spec, num_sequences, reads

    def clear(self) -> None:
        super().clear()
        self.works.clear()

    def computed(self, name: str, inputs: Sequence[Any], output: Any) -> None:
        super().computed(name, inputs, output)
        tensors, results = [*tensors_of(inputs)], [*tensors_of([output])]
        written = size_of(results)
        if name in GATHERS:  # the rows that are taken, and not the whole table
            tensors = tensors[1:]
            written *= 2
        self._work(name).add(size_of(tensors) + written, product_flops(name, tensors))

    def launched(self, name: str, arguments: Sequence[Any]) -> None:
        super().launched(name, arguments)
        self._work(name).add(*self._launch_work(name, arguments))

    def _work(self, name: str) -> NodeCost:
        return self.works.setdefault(name, NodeCost(name))

    def _launch_work(self, name: str, arguments: Sequence[Any]) -> tuple[float, float, float]:
        """Return the bytes, FLOPs and repeated bytes of a kernel: those of its tensors, if it reads no cache."""
        spec, rows = self._spec, self._num_sequences
        text_width, media_width = spec.num_heads * spec.head_dim, spec.media_inner
        if name == MEDIA_KERNEL:
            page = 2 * spec.num_latents * media_width * DTYPE.itemsize
            return rows * (page + 2 * media_width * DTYPE.itemsize), 4.0 * rows * spec.num_latents * media_width, 0.0
        if name not in PAGED_KERNELS:
            return size_of(tensors_of(arguments)), 0.0, 0.0
        reads = self._reads
        token, partial_row = 2 * text_width * DTYPE.itemsize, text_width * torch.float32.itemsize
        if name == MERGE_KERNEL:
            return reads.partial_rows * partial_row + rows * text_width * DTYPE.itemsize, 0.0, 0.0
        queries = rows * text_width * DTYPE.itemsize + reads.partial_rows * partial_row
        repeated = (reads.slots_of_tiles - reads.slots) * token
        return reads.slots * token + queries, 4.0 * reads.slots_of_rows * text_width, repeated


MEDIA_KERNEL, MERGE_KERNEL = "_forward", "_merge_parts"
PAGED_KERNELS = ("_attend_tile", MERGE_KERNEL)
PRODUCTS = ("mm", "addmm", "addmm_")
GATHERS = {"embedding", "index_select", "index"}


class Reads(NamedTuple):
    """The reads of a step's plan from the text cache, in one layer."""

    slots: int  # of different tokens
    slots_of_tiles: int  # by all tiles
    slots_of_rows: int  # by all rows
    partial_rows: int  # rows of results, before they are merged


def paged_reads(spec: Spec, num_sequences: int) -> Reads:
    """Return the reads of the plan that the host builds for sequences that share their shots."""
    table = block_table(SIZES, num_sequences, is_shared=True)
    starts = torch.arange(num_sequences + 1, dtype=torch.int32)
    contexts = torch.full((num_sequences,), SIZES.context, dtype=torch.int32)
    shape = TileShape(BLOCK_SIZE, 1, spec.head_dim, DTYPE)
    plan = plan_tiles(table, starts, contexts, num_tokens=num_sequences, shape=shape)
    assert plan.few is not None
    return Reads(
        slots=SIZES.shared_tokens + num_sequences * SIZES.query_tokens,
        slots_of_tiles=_slots_of_tiles(plan.few),
        slots_of_rows=num_sequences * SIZES.context,
        partial_rows=len(plan.few.members),
    )


def _slots_of_tiles(tiles: Tiles) -> int:
    part, end = tiles.records[:, 3], tiles.records[:, 4]
    return int((end - part * tiles.split).sum())


def tensors_of(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def size_of(tensors: Iterable[torch.Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.itemsize for tensor in tensors))


def product_flops(name: str, tensors: Sequence[torch.Tensor]) -> float:
    """Return 2 m n k of a product [m, k] x [k, n], the last two tensors of one of `PRODUCTS`; 0 of other operators."""
    if name not in PRODUCTS:
        return 0.0
    left, right = tensors[-2:]
    return 2.0 * left.numel() * right.shape[-1]


def floor_seconds(spec: Spec, num_sequences: int) -> float:
    """Return the least time for the weights, the text of all sequences with the shared shots once, and their images."""
    text = (SIZES.shared_tokens + num_sequences * SIZES.query_tokens) * spec.text_bytes
    num_bytes = 2.0 * spec.step_params + text + num_sequences * spec.media_bytes
    attention = 4.0 * SIZES.context * spec.dim * spec.num_layers
    attention += 4.0 * spec.num_latents * spec.media_inner * spec.gated_layers
    flops = num_sequences * (2.0 * spec.step_params + attention)
    return max(num_bytes / BANDWIDTH.value, flops / FLOPS.value)


def costs_of(name: str, num_sequences: int) -> Costs:
    spec = SPECS[name]
    with mock.patch.object(backend, "INTERPRETING", True):  # the launch table needs no GPU
        costs = Costs(spec, num_sequences, paged_reads(spec, num_sequences))
    run_step(PUBLISHED[name], num_sequences, costs)
    return costs


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    constants = {f"{constant.name}, {constant.unit}": constant.value for constant in CONSTANTS}
    report = Report("Estimate of decode steps on an H100; nothing is measured", {**as_settings(options), **constants})
    for name in options.models:
        for num_sequences in options.sequences:
            works = [*costs_of(name, num_sequences).works.values()]
            _add(report, name, num_sequences, works)
            print(f"{name}, {num_sequences} sequences\n{format_table(_most_expensive(works))}\n")
    report.print()
    return 0


def _add(report: Report, name: str, num_sequences: int, works: Sequence[NodeCost]) -> None:
    floor, estimate = floor_seconds(SPECS[name], num_sequences), sum(work.seconds for work in works)
    num_nodes = sum(work.nodes for work in works)
    report.add(
        {
            "model": name,
            "sequences": num_sequences,
            "nodes": num_nodes,
            "GB": sum(work.num_bytes for work in works) / 1e9,
            "GFLOP": sum(work.flops for work in works) / 1e9,
            "launches ms": 1e3 * num_nodes * NODE.value,
            "estimate ms": 1e3 * estimate,
            "without L2 ms": 1e3 * sum(work.seconds_without_l2 for work in works),
            "floor ms": 1e3 * floor,
            "floor / estimate": floor / estimate,
        }
    )
    if (aim := AIMS.get(num_sequences)) is not None:
        report.bars.append(Bar(name=f"{name}, {num_sequences} sequences", value=floor / estimate, at_least=aim))


def _most_expensive(works: Sequence[NodeCost]) -> list[dict[str, str | int | float]]:
    ordered = sorted(works, key=lambda work: work.seconds, reverse=True)
    row = partial(_row, sum(work.seconds for work in works))
    rest = NodeCost("all others")
    for work in ordered[MOST_EXPENSIVE:]:
        rest.nodes += work.nodes
        rest.num_bytes += work.num_bytes
        rest.flops += work.flops
        rest.seconds += work.seconds
    return [row(work) for work in (*ordered[:MOST_EXPENSIVE], rest)]


def _row(total: float, work: NodeCost) -> dict[str, str | int | float]:
    return {
        "node": work.name,
        "nodes": work.nodes,
        "MB": work.num_bytes / 1e6,
        "GFLOP": work.flops / 1e9,
        "us": 1e6 * work.seconds,
        "share": work.seconds / total,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.floors", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED), help="names of models")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1, 64], help="numbers of sequences (default: 1 64)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
