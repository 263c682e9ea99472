"""The processors that kernels are compiled for, and which of them a test takes.

`ALL_TARGETS=1 python -m pytest tests/kernels_compile` compiles every configuration for all of them. Without the variable,
each is compiled for one of them in turn: compiling takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import cycle, dropwhile

KIB = 1024
# the shared memory of a program
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}


def with_targets(names: Iterable[str], first: str = "sm_80") -> list[tuple[str, str]]:
    """Return pairs of a configuration's name and a target; without ALL_TARGETS, the targets take turns from `first` on."""
    if os.environ.get("ALL_TARGETS"):
        return [(name, target) for name in names for target in SHARED_LIMIT]
    targets = dropwhile(lambda target: target != first, cycle(SHARED_LIMIT))
    return list(zip(names, targets, strict=False))
