"""Counts the nodes of a recorded decode step, by model: `python -m bench.nodes`.

A GPU takes one to two microseconds for a node of a graph, however little it computes. The step that a GPU replays runs on
the meta device, where nothing is computed, and its operators and kernels are counted. An operator of torch counts as one
node, which is a lower bound.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from bench import random_models
from bench.options import as_settings, parse
from bench.published_models import MAX_TOKENS, PUBLISHED
from bench.table import Report
from kernels import backend
from kernels.paged_plan import TileShape, static_plan
from kernels.rows import greedy_argmax_reference
from model.batch import Batch, KVCache, MediaPages
from model.config import FlamingoConfig
from model.flamingo import Flamingo
from model.presets.paper import PRESETS
from server.engine.device.graphs import static_batch

QUICK = {"rows": [1], "models": ["tiny"]}
BLOCK_SIZE = 16
DEVICE, DTYPE = torch.device("meta"), torch.bfloat16
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
MOST_FREQUENT = 4


TINY = random_models.config("tiny", random_models.SIZES["tiny"])
MODELS = {**PUBLISHED, **PRESETS}


class Nodes(TorchDispatchMode):
    """Counts the operators that compute something, and the kernels of Triton in place of launching them."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.kernels = Counter[str](), Counter[str]()

    def clear(self) -> None:
        self.operators.clear()
        self.kernels.clear()

    def computed(self, name: str, inputs: Sequence[Any], output: Any) -> None:
        """Count an operator of torch."""
        self.operators[name] += 1

    def launched(self, name: str, arguments: Sequence[Any]) -> None:
        """Count a kernel of Triton."""
        self.kernels[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        aliases = [returned.alias_info for returned in func._schema.returns if returned.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        output = func(*args, **(kwargs or {}))
        if not is_view and name not in ALLOCATIONS:
            self.computed(name, [*args, *(kwargs or {}).values()], output)
        return output

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count as on a GPU, with Triton's kernels."""

        def launch(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
            self.launched(kernel.fn.__name__, [*args, *kwargs.values()])

        with mock.patch.object(backend, "INTERPRETING", True), mock.patch.object(JITFunction, "run", launch), self:
            yield


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    report = Report("Nodes of a recorded decode step", as_settings(options))
    for name in options.models:
        for num_rows in options.rows:
            nodes = count_nodes(TINY if name == "tiny" else MODELS[name], num_rows)
            triton, torch_nodes = nodes.kernels.total(), nodes.operators.total()
            frequent = (nodes.kernels + nodes.operators).most_common(MOST_FREQUENT)
            report.add(
                {
                    "model": name,
                    "rows": num_rows,
                    "Triton": triton,
                    "torch": torch_nodes,
                    "nodes": triton + torch_nodes,
                    "most frequent": ", ".join(f"{node} {count}" for node, count in frequent),
                }
            )
    report.print()
    return 0


def count_nodes(config: FlamingoConfig, num_rows: int) -> Nodes:
    """Count the nodes of the step that is recorded for this number of rows."""
    nodes = Nodes()
    run_step(config, num_rows, nodes)
    return nodes


@torch.no_grad()
def run_step(config: FlamingoConfig, num_rows: int, nodes: Nodes) -> None:
    """Run the step that is recorded for this number of rows on the meta device, and count its nodes."""
    with torch.device(DEVICE):
        model = Flamingo(config).to(DTYPE)
    for gated in model.gated_layers().values():  # as after folding
        gated.attn_gate = gated.ffw_gate = None
    kv = KVCache.zeros(config, 1, BLOCK_SIZE, DTYPE, DEVICE)
    pages = MediaPages.zeros(config, 1, DTYPE, DEVICE)
    suppressed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with nodes.counting():
        batch = static_step(config, num_rows)
        for _ in range(2):  # the first step also computes values that later steps find in caches
            nodes.clear()
            greedy_argmax_reference(model(batch, kv, pages), suppressed)


def static_step(config: FlamingoConfig, num_rows: int) -> Batch:
    """Return the batch on the meta device that a recorded step of this number of rows reads."""
    text, width = config.language_model, MAX_TOKENS // BLOCK_SIZE
    shape = TileShape(BLOCK_SIZE, text.num_heads // text.num_kv_heads, text.head_dim, DTYPE)
    tiles = torch.zeros(num_rows, 4, dtype=torch.int32)
    batch = replace(
        static_batch(num_rows, width, BLOCK_SIZE), plan=static_plan(num_rows, width, shape), media_plan=tiles
    )
    return batch.with_tensors(tensor.to(DEVICE) for tensor in batch.tensors)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.nodes", description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        choices=["tiny", *MODELS],
        help="names of models (default: all but tiny)",
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="numbers of sequences (default: 1 64)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
