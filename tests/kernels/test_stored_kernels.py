"""Kernels of a CPU in other processes: a later one loads their binaries, and one without Numba does without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.backend import runs_numba
from tests.kernels.test_integer_product import needs_instructions

needs_numba = pytest.mark.skipif(not runs_numba(), reason="Numba has no wheel for this platform")

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

# each row is a token of one sequence; a kernel for one thread would rotate them in each of four
ATTEND = """
import torch
from kernels import paged_attention_loop
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.paged_attention_loop import LoopRows

torch.set_num_threads(4)
paged_attention_loop.MIN_THREADED_SCORES = 0
rows = LoopRows(torch.arange(4).int(), torch.arange(2).int().repeat(4, 1), torch.arange(4, 8).int(), None)
qkv, angles, cache = torch.randn(4, 64), torch.rand(4, 1, 16), torch.randn(2, 2, 1, 4, 16)
step = angles.cos(), angles.sin(), cache, rows, 0.25
expected = decode_attention_reference(qkv, *step)
is_close = all(torch.allclose(decode_attention(qkv.clone(), *step), expected, atol=1e-4) for _ in range(100))
print("equal" if is_close else "different")
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


@needs_numba
def test_a_binary_without_an_openmp_runtime_is_not_loaded_with_one(tmp_path: Path) -> None:
    without = "import kernels.threads\nkernels.threads._openmp = lambda: None\n"
    assert run(without + ATTEND, NUMBA_CACHE_DIR=str(tmp_path)) == "equal"
    assert run(ATTEND, NUMBA_CACHE_DIR=str(tmp_path)) == "equal"
