"""The programs of a compiled kernel that a core holds; and no kernel of a model's own steps spills."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from bench.occupancy import programs_per_core
from bench.table import ROOT
from kernels.bench.ahead_of_time import Compiled

KIB = 1024
KERNEL = Compiled(
    name="kernel", target="sm_90", binary="", threads=128, shared=20 * KIB, spills=0, registers=48, tensor_core=0,
    copies=0, wide_copies=0, halfword_copies=0, early_copies=0, copies_in_flight=0, waits=0, copies_before_wait=0,
    stores=0, wide_stores=0, layouts=frozenset(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 10),  # registers, 4 warps of 1,536 each; shared memory would permit 10 as well
        ({"shared": 0}, 10),
        ({"shared": 40 * KIB}, 5),
        ({"shared": 0, "registers": 16}, 16),  # 64 warps
        ({"shared": 0, "registers": 16, "threads": 32}, 32),
        ({"registers": 185, "threads": 256, "shared": 80 * KIB}, 1),
        ({"target": "sm_80", "shared": 80 * KIB}, 2),
        ({"target": "gfx942", "threads": 256, "registers": 124, "shared": 18 * KIB}, 3),
        ({"target": "gfx942", "threads": 256, "registers": 124, "shared": 0}, 4),
    ],
)
def test_a_core_holds_as_many_programs_as_its_scarcest_part_permits(
    changes: dict[str, int | str], expected: int
) -> None:
    assert programs_per_core(replace(KERNEL, **changes)) == expected  # type: ignore[arg-type]


def test_no_kernel_of_a_models_own_steps_spills() -> None:
    """In a process of its own: the compiler is bound to Triton's kernels at their import."""
    program = """
from bench.occupancy import rows_of
for row in rows_of("OF-3B", "sm_90"):
    print(row["step"], row["kernel"], row["spills"], row["per core"] > 0, sep=",")
"""
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    rows = [row.split(",") for row in finished.stdout.splitlines()]
    assert {kernel for _, kernel, *_ in rows} >= {"_forward", "_attend_tile", "_merge_parts", "_norm_row"}
    assert {step for step, *_ in rows} == {"prompt of 512", "decode of 64", "16 images"}
    assert {(spills, fits) for *_, spills, fits in rows} == {("0", "True")}
