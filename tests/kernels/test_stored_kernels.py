"""Kernels of a CPU in other processes: a later one loads their binaries, and one without Numba does without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.test_integer_product import needs_instructions

MULTIPLY = """
import torch
from kernels.integer_product import instructions_for, integer_product, pack

weights = pack(torch.ones(16, 32), 4, instructions_for(4))
print(integer_product(torch.ones(1, 32, dtype=torch.bfloat16), weights)[0, 0].item())
"""
WITHOUT_NUMBA = """
import sys

sys.modules["numba"] = None
import torch
from model.products import FORMATS

product = FORMATS["int4"](torch.ones(16, 32), None)
print(type(product).__name__, product(torch.ones(1, 32, dtype=torch.bfloat16))[0, 0].item())
"""


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout.strip()


@needs_instructions
def test_a_later_process_loads_the_binary(tmp_path: Path) -> None:
    files: list[list[Path]] = []
    for _ in range(2):
        assert run(MULTIPLY, NUMBA_CACHE_DIR=str(tmp_path)) == "32.0"
        files.append(sorted(tmp_path.rglob("*.nb?")))
    assert len(files[0]) == 2, "an index, and one binary"
    assert files[1] == files[0]


def test_without_numba_torch_multiplies() -> None:
    assert run(WITHOUT_NUMBA) == "Int4 32.0"
