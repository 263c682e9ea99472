"""Print a model's parameters by part, next to the paper's figures: `python -m model.describe [NAME|FOLDER ...]`.

A NAME is one of the paper's models (`model/presets/paper.py`), openflamingo-9b, idefics-9b, idefics-80b or default.
Parameters are counted on the meta device. Published figures are those of table 1 and section 4.1.1. A mark is at those
that contradict the paper's own table of layers and widths.

With `--tensor-parallel N`, print instead the memory that each of N devices needs: weights, and keys and values of text and
of media. With `--weight-format FORMAT`, print the memory of one device whose decoder weights are in this format. With
`--device-memory GIB` in addition, print whether all of it fits, with one request of the maximum length and 32 shots, and
the smallest number of devices that is enough.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.config import ConfigError, FlamingoConfig, load_config
from model.flamingo import Flamingo
from model.footprint import Footprint, smallest_size
from model.presets.paper import PRESETS
from model.presets.published import MODELS
from model.quantised import KINDS, WeightFormat
from model.ranks import MAX_RANKS, Rank
from model.zoo.default import DEFAULT

PARTS = {"language_model": "frozen", "vision": "frozen", "gated": "trainable", "resampler": "trainable"}
TRAINABLE = tuple(part for part, weights in PARTS.items() if weights == "trainable")

# numbers of parameters as stated: by part and in total in table 1, trainable ones in section 4.1.1
PUBLISHED = {
    "flamingo-3b": {
        "language_model": 1.4e9,
        "vision": 435e6,
        "gated": 1.2e9,
        "resampler": 194e6,
        "trainable": 1.4e9,
        "total": 3.2e9,
    },
    "flamingo-9b": {
        "language_model": 7.1e9,
        "vision": 435e6,
        "gated": 1.6e9,
        "resampler": 194e6,
        "trainable": 1.8e9,
        "total": 9.3e9,
    },
    "flamingo-80b": {
        "language_model": 70e9,
        "vision": 435e6,
        "gated": 10e9,
        "resampler": 194e6,
        "trainable": 10e9,
        "total": 80e9,
    },
}
# published figures that do not follow from the paper's own table of layers and widths (appendix C.1)
DOES_NOT_FOLLOW = {
    ("flamingo-9b", "gated"): "*",
    ("flamingo-9b", "language_model"): "+",
    ("flamingo-9b", "trainable"): "#",
    ("flamingo-9b", "total"): "#",
    ("flamingo-80b", "gated"): "*",
    ("flamingo-80b", "trainable"): "#",
}
NOTES = {
    "*": "does not follow from the paper's own layers and widths",
    "+": "40 layers of width 4096 have more than 7.1 B parameters in any variant",
    "#": "the sum of a marked figure and others",
}
HEAD = ("part", "weights", "parameters (M)", "share", "published (M)", "share", "ratio")
NUM_TEXTS = 2  # leading columns of text; the others are numbers
MEMORY_HEAD: tuple[str, ...] = ("memory", "unit", "whole", "per device")
DTYPE = torch.bfloat16
GIB, MIB, KIB = 2**30, 2**20, 2**10


@dataclass(frozen=True, slots=True)
class Row:
    """A part or a sum of parts: its number of parameters, and the published number, 0 if there is none."""

    name: str
    weights: str
    number: int
    published: float
    mark: str

    def cells(self, total: Row) -> tuple[str, ...]:
        ours = (self.name, self.weights, f"{self.number / 1e6:,.1f}", f"{self.number / total.number:.1%}")
        if not self.published:
            return (*ours, "-", "-", "-")
        published = f"{self.published / 1e6:,.0f} {self.mark}".strip()
        return (*ours, published, f"{self.published / total.published:.1%}", f"{self.number / self.published:.2f}")


def parameters(config: FlamingoConfig) -> dict[str, int]:
    """Return the number of parameters by part; rows of new tokens count as the language model's."""
    with torch.device("meta"):
        model = Flamingo(config)
    return {part: sum(weights.numel() for weights in getattr(model, part).parameters()) for part in PARTS}


def rows(config: FlamingoConfig) -> list[Row]:
    """Return the parts, then the sum of the trainable ones, then the total."""
    counted = parameters(config)
    sums = {"trainable": sum(counted[part] for part in TRAINABLE), "total": sum(counted.values())}
    name = preset_name(config)
    published = PUBLISHED.get(name, {})
    return [
        Row(part, PARTS.get(part, ""), number, published.get(part, 0.0), DOES_NOT_FOLLOW.get((name, part), ""))
        for part, number in (counted | sums).items()
    ]


def preset_name(config: FlamingoConfig) -> str:
    """Return the name of the preset with this configuration, whatever the model's own name, or ""."""
    return next((name for name, preset in PRESETS.items() if replace(config, name=name) == preset), "")


def table(config: FlamingoConfig) -> str:
    lines = rows(config)
    marks = dict.fromkeys(row.mark for row in lines if row.mark)
    return "\n".join(
        [
            f"{config.name}: gated layers before {list(config.gated_layers)}",
            *_aligned([HEAD, *(row.cells(lines[-1]) for row in lines)]),
            *(f"{mark} {NOTES[mark]}" for mark in marks),
        ]
    )


def memory_table(
    config: FlamingoConfig, size: int, device_memory: float | None, weight_format: WeightFormat | None = None
) -> str:
    """Return what each of `size` devices holds, and whether that fits into `device_memory` GiB."""
    whole, rank = Footprint.of(config, DTYPE), Footprint.of(config, DTYPE, Rank(0, size), weight_format)
    quantities = [
        *((part, "GiB", whole.weights[part] / GIB, rank.weights[part] / GIB) for part in PARTS),
        ("all weights", "GiB", sum(whole.weights.values()) / GIB, sum(rank.weights.values()) / GIB),
        ("a token of text", "KiB", whole.token / KIB, rank.token / KIB),
        ("a media item", "MiB", whole.page / MIB, rank.page / MIB),
        ("all weights and one request", "GiB", whole.needed / GIB, rank.needed / GIB),
    ]
    cells = [(name, unit, f"{total:,.2f}", f"{share:,.2f}") for name, unit, total, share in quantities]
    heading, head = f"{config.name}: {size} devices, bfloat16", MEMORY_HEAD
    if weight_format is not None:
        heading, head = f"{config.name}: one device", (*MEMORY_HEAD[:NUM_TEXTS], "bfloat16", weight_format)
    return "\n".join([heading, *_aligned([head, *cells]), *_verdict(config, rank, device_memory, weight_format)])


def _verdict(
    config: FlamingoConfig, rank: Footprint, device_memory: float | None, weight_format: WeightFormat | None
) -> list[str]:
    if device_memory is None:
        return []
    device_bytes = int(device_memory * GIB)
    verdict = "fits" if rank.fits(device_bytes) else "does not fit"
    if weight_format is not None:  # a divided model has no weight format
        return [f"{verdict} into a device of {device_memory:g} GiB"]
    smallest = smallest_size(config, DTYPE, device_bytes)
    fewest = f"{smallest} are the fewest" if smallest else f"not even {MAX_RANKS} are enough"
    return [f"{verdict} into devices of {device_memory:g} GiB, of which {fewest}"]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [_line(row, widths) for row in cells]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if column < NUM_TEXTS else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded)


KNOWN = {**PRESETS, **MODELS, "default": DEFAULT, DEFAULT.name: DEFAULT}
NAMES = f"a model folder, or one of {', '.join(KNOWN)} (default: the paper's models)"


def find(name: str) -> FlamingoConfig:
    if name in KNOWN:
        return KNOWN[name]
    if Path(name).is_dir():
        return load_config(Path(name))
    raise ConfigError(f"{name!r} is neither a model folder nor one of {', '.join(KNOWN)}")


DESCRIPTION = f"""Print a model's parameters by part, next to the figures of the paper's table 1 and section 4.1.1.
{", ".join(NOTES)} mark published figures that contradict the paper's own table of layers and widths.
With --tensor-parallel or --weight-format, print the memory instead: weights, and keys and values of text and of media.
With --device-memory in addition, print whether all of it fits, with one request of the maximum length and 32 shots, and
the smallest number of devices that is enough."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m model.describe") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("names", nargs="*", default=list(PRESETS), metavar="NAME|FOLDER", help=NAMES)
    parser.add_argument(
        "--tensor-parallel", type=int, metavar="N", help="print the memory that each of N devices needs"
    )
    parser.add_argument("--weight-format", choices=KINDS, help="print the memory with decoder weights in this format")
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="memory of a device, with one of the above")
    parsed = parser.parse_args(arguments)
    size, weight_format = parsed.tensor_parallel, parsed.weight_format
    if size is None and weight_format is None and parsed.device_memory is not None:
        parser.error("--device-memory needs --tensor-parallel or --weight-format")
    if parsed.device_memory is not None and not 0 < parsed.device_memory * GIB < math.inf:
        parser.error(f"--device-memory is {parsed.device_memory:g}, must be a positive number")
    if size is not None and size < 1:
        parser.error(f"--tensor-parallel is {size}, must be at least 1")
    if size is not None and size > 1 and weight_format is not None:
        parser.error(f"--weight-format {weight_format} is not supported with --tensor-parallel {size}")
    try:
        configs = [find(name) for name in parsed.names]
        if size is None and weight_format is None:
            tables = [table(config) for config in configs]
        else:
            tables = [memory_table(config, size or 1, parsed.device_memory, weight_format) for config in configs]
        print("\n\n".join(tables))
    except ConfigError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
