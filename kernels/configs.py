"""The shipped launch configurations, by operator, architecture, head size and dtype. Nothing is tuned at request time.

`load` replaces rows by those of a file that `python -m kernels.bench` wrote on the machine at hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.backend import interpreting, triton

LOG2_E = 1.4426950408889634  # the kernels compute exp2


@dataclass(frozen=True, slots=True)
class Launch:
    block: int  # rows a program takes
    num_warps: int
    num_stages: int  # loads in flight

    @property
    def options(self) -> dict[str, Any]:
        # fusing multiply and add is no longer the default from Triton 3.10 on
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# an operator's row for every architecture, head size and dtype that has none of its own; it fits into the 64 KiB of
# shared memory that gfx942 has
DEFAULTS = {
    "media": Launch(16, 4, 2),
    "media_backward": Launch(16, 4, 1),
    "resampler": Launch(64, 4, 1),
    "resampler_backward": Launch(64, 4, 1),
    "paged_prefill": Launch(64, 4, 1),
    "paged_decode": Launch(16, 4, 2),
    "row": Launch(1, 4, 1),
    "skinny": Launch(16, 4, 3),
}

Key = tuple[str, str, int, str]  # operator, architecture, head size, dtype
TABLE: dict[Key, Launch] = {}


def architecture() -> str:
    """sm_90, gfx942, ...; the interpreter has the defaults."""
    if interpreting():
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def launch_config(operator: str, head_dim: int, dtype: torch.dtype) -> Launch:
    key = (operator, architecture(), head_dim, str(dtype).removeprefix("torch."))
    return TABLE.get(key, DEFAULTS[operator])


def load(file: Path) -> None:
    """Rows {"operator", "architecture", "head_dim", "dtype", "block", "num_warps", "num_stages"} of a JSON list."""
    for row in json.loads(file.read_text(encoding="utf-8")):
        if row["operator"] not in DEFAULTS:
            raise ValueError(f"{file}: operator {row['operator']!r} is none of {', '.join(DEFAULTS)}")
        key = (row["operator"], row["architecture"], row["head_dim"], row["dtype"])
        TABLE[key] = Launch(row["block"], row["num_warps"], row["num_stages"])
