"""The launch configurations, by operator, architecture, head size and dtype; nothing is tuned at request time.

`load` replaces rows by those of a file that `python -m kernels.bench --launches FILE` wrote on this machine.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.backend import interpreting, triton


@dataclass(frozen=True, slots=True)
class Launch:
    block: int  # rows per program
    num_warps: int
    num_stages: int  # loads in flight

    @property
    def options(self) -> dict[str, Any]:
        # fusing multiply and add is no longer the default from Triton 3.10 on
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# For every architecture, head size and dtype without a row of its own: the shape that compiles everywhere without spills,
# in the 64 KiB of shared memory of gfx942. Media attention has no other: more rows per tile do not speed it up, and would
# change the order of its sums between decode and prefill.
DEFAULTS = {
    "media": Launch(16, 4, 2),
    "media_backward": Launch(16, 4, 1),
    "resampler": Launch(16, 4, 2),
    "resampler_backward": Launch(16, 4, 1),
    "paged_prefill": Launch(16, 4, 2),
    "paged_decode": Launch(16, 4, 2),
    "row": Launch(1, 4, 1),
}

NVIDIA = ("sm_80", "sm_90", "sm_100")
HALF = ("bfloat16", "float16")
SHIPPED: tuple[tuple[str, tuple[str, ...], tuple[int, ...], tuple[str, ...], Launch], ...] = (
    # operator, architectures, head sizes, dtypes, launch
    ("resampler", NVIDIA, (64,), HALF, Launch(64, 4, 1)),
    ("resampler", NVIDIA[1:], (96,), HALF, Launch(64, 4, 1)),  # on sm_80, which has no wgmma, this spills
    ("resampler_backward", NVIDIA, (64,), HALF, Launch(64, 4, 1)),
    ("resampler_backward", NVIDIA[1:], (96,), HALF, Launch(64, 4, 1)),
    ("paged_prefill", NVIDIA, (64,), HALF, Launch(64, 4, 2)),
    ("paged_prefill", NVIDIA, (80, 128), HALF, Launch(64, 8, 2)),  # 4 warps would use every register
)

Key = tuple[str, str, int, str]  # operator, architecture, head size, dtype
TABLE: dict[Key, Launch] = {
    (operator, architecture, head_dim, dtype): launch
    for operator, architectures, head_dims, dtypes, launch in SHIPPED
    for architecture, head_dim, dtype in itertools.product(architectures, head_dims, dtypes)
}


def architecture() -> str:
    """Return sm_90, gfx942, ...; under the interpreter, a name that takes the defaults."""
    return "interpreter" if interpreting() else _architecture_of(triton.runtime.driver.active)


@cache  # called at every launch
def _architecture_of(driver: Any) -> str:
    target = driver.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def launch_config(operator: str, head_dim: int, dtype: torch.dtype) -> Launch:
    key = (operator, architecture(), head_dim, str(dtype).removeprefix("torch."))
    return TABLE.get(key, DEFAULTS[operator])


def load(file: Path) -> None:
    """Load a JSON list of {"operator", "architecture", "head_dim", "dtype", "block", "num_warps", "num_stages"}.

    Raises `ValueError` for an unknown operator.
    """
    for row in json.loads(file.read_text(encoding="utf-8")):
        if row["operator"] not in DEFAULTS:
            raise ValueError(f"{file}: operator {row['operator']!r} is none of {', '.join(DEFAULTS)}")
        key = (row["operator"], row["architecture"], row["head_dim"], row["dtype"])
        TABLE[key] = Launch(row["block"], row["num_warps"], row["num_stages"])
