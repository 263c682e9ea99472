"""Prints the resources of a step's kernels, and how many programs of each fit on a core: `python -m bench.occupancy`.

The model's own forward runs on the meta device, and each launch is compiled for a target, without a GPU. The table has the
registers, the shared memory and the spills of each kernel, its programs in a step, and the *waves*: these programs divided
by those that all cores of a card hold at once. A core is a multiprocessor of NVIDIA or a compute unit of AMD.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bench.nodes import BLOCK_SIZE, DEVICE, DTYPE, static_step
from bench.options import as_settings, parse
from bench.published_models import PUBLISHED
from bench.table import Report
from kernels.bench.ahead_of_time import TARGETS, Compiled, Launched, compiling, read
from kernels.media_attention_gpu import media_tiles
from kernels.paged_plan import TileShape, plan_tiles
from model.batch import Batch, KVCache, MediaPages
from model.config import FlamingoConfig
from model.flamingo import Flamingo

QUICK = {"models": ["OF-3B"], "targets": ["sm_90"]}
PROMPT, SHOT, SEQUENCES, IMAGES = 512, 32, 64, 16
# more than 32-bit offsets can address, as in production
NUM_BLOCKS, NUM_PAGES = 1 << 15, 1 << 12
KIB = 1024


@dataclass(frozen=True, slots=True)
class Core:
    """The resources of a core, which its programs share, and the number of cores of a card."""

    cores: int
    registers: int  # of 32 bits
    registers_at_once: int  # the granule in which a warp gets them
    shared: int
    shared_per_program: int  # that the system takes
    max_programs: int
    max_warps: int


CARDS = {
    "sm_80": Core(108, 1 << 16, 256, 164 * KIB, KIB, 32, 64),  # A100
    "sm_90": Core(132, 1 << 16, 256, 228 * KIB, KIB, 32, 64),  # H100
    "sm_100": Core(148, 1 << 16, 256, 228 * KIB, KIB, 32, 64),  # B200
    "gfx942": Core(304, 4 * 512 * 64, 8 * 64, 64 * KIB, 0, 32, 32),  # MI300X
}


def programs_per_core(kernel: Compiled) -> int:
    """Return how many programs of a kernel a core holds at once."""
    core, lanes = CARDS[kernel.target], TARGETS[kernel.target].warp_size
    warps = kernel.threads // lanes
    per_warp = -(-kernel.registers * lanes // core.registers_at_once) * core.registers_at_once
    by_registers = core.registers // per_warp // warps
    by_shared = core.shared // (kernel.shared + core.shared_per_program) if kernel.shared else core.max_programs
    return min(by_registers, by_shared, core.max_programs, core.max_warps // warps)


def steps_of(config: FlamingoConfig) -> dict[str, Callable[[], object]]:
    """Return the steps whose kernels are compiled; layers are alike, so one gated layer and those up to it suffice."""
    config = with_few_layers(config)
    with torch.device(DEVICE):
        model = Flamingo(config).to(DTYPE).requires_grad_(False)
    for gated in model.gated_layers().values():  # as after folding
        gated.attn_gate = gated.ffw_gate = None
    kv = KVCache.zeros(config, NUM_BLOCKS, BLOCK_SIZE, DTYPE, DEVICE)
    pages = MediaPages.zeros(config, NUM_PAGES, DTYPE, DEVICE)
    vision = config.vision
    features = torch.empty(IMAGES, 1, vision.num_patches, vision.width, dtype=DTYPE, device=DEVICE)
    return {
        f"prompt of {PROMPT}": lambda: model(prompt(config), kv, pages),
        f"decode of {SEQUENCES}": lambda: model(static_step(config, SEQUENCES), kv, pages),
        f"{IMAGES} images": lambda: model.resampler(features),
    }


def with_few_layers(config: FlamingoConfig) -> FlamingoConfig:
    num_layers = config.gated.first_layer + 1
    return replace(config, language_model=replace(config.language_model, num_layers=num_layers))


def prompt(config: FlamingoConfig) -> Batch:
    """Return the batch of one prompt of shots, with the plans that the host builds."""
    text, positions = config.language_model, torch.arange(PROMPT)
    table = torch.arange(PROMPT // BLOCK_SIZE, dtype=torch.int32)[None]
    starts, lengths = torch.tensor([0, PROMPT], dtype=torch.int32), torch.tensor([PROMPT], dtype=torch.int32)
    slots = (positions // SHOT).to(torch.int32)
    shape = TileShape(BLOCK_SIZE, text.num_heads // text.num_kv_heads, text.head_dim, DTYPE)
    batch = Batch(
        token_ids=positions,
        positions=positions,
        media_slot=slots,
        media_plan=media_tiles(slots, config.gated.head_dim, DTYPE),
        query_starts=starts,
        last_token=torch.tensor([PROMPT - 1]),
        context_lengths=lengths,
        block_table=table,
        slot_mapping=positions,
        plan=plan_tiles(table, starts, lengths, num_tokens=PROMPT, shape=shape),
    )
    return batch.with_tensors(tensor.to(DEVICE) for tensor in batch.tensors)


@torch.no_grad()
def rows_of(name: str, target: str) -> list[dict[str, str | int | float]]:
    rows = []
    for step, launch in steps_of(PUBLISHED[name]).items():
        with compiling(target) as launched:
            launch()
        rows += [{"model": name, "step": step, **_row(kernel, launched)} for kernel in read(launched, target)]
    return rows


def _row(kernel: Compiled, launched: Sequence[Launched]) -> dict[str, str | int | float]:
    programs = max(launch.programs for launch in launched if launch.kernel.hash == kernel.binary)
    at_once = programs_per_core(kernel)
    return {
        "target": kernel.target,
        "kernel": kernel.name,
        "warps": kernel.threads // TARGETS[kernel.target].warp_size,
        "registers": kernel.registers,
        "shared KiB": kernel.shared / KIB,
        "spills": kernel.spills,
        "per core": at_once,
        "programs": programs,
        "waves": programs / (at_once * CARDS[kernel.target].cores) if at_once else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    report = Report("The compiled kernels", as_settings(options), ["triton"])
    for target in options.targets:
        for name in options.models:
            for row in rows_of(name, target):
                report.add(row)
    report.print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.occupancy", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED), help="names of models")
    parser.add_argument("--targets", nargs="+", default=list(CARDS), choices=list(CARDS), help="architectures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
