"""The kernels of packed weights compile for every target: without spills, with wide loads, and all of them at start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.fp8 import quantise_rows
from kernels.weight_only import MAX_ROWS, int4_linear, int8_linear
from kernels.weight_only_gpu import FEATURES
from tests.kernels_compile.targets import SHARED_LIMIT, with_targets

WIDTH = 4096
Compile = Callable[..., list[Any]]


def int8(num_rows: int, num_features: int = 11008, width: int = WIDTH) -> Tensor:
    weight = torch.empty(num_features, width, dtype=torch.int8)
    return int8_linear(torch.empty(num_rows, width, dtype=torch.bfloat16), weight, torch.empty(num_features))


def int4(num_rows: int, num_features: int = 11008, width: int = WIDTH) -> Tensor:
    packed = torch.empty(width // 64, num_features, 32, dtype=torch.uint8)
    constants = torch.empty(width // 32, num_features, 2, dtype=torch.bfloat16)
    return int4_linear(torch.empty(num_rows, width, dtype=torch.bfloat16), packed, constants)


# the products, and the bytes of the tiles that a program loads per step: weights, and columns of 16 rows
PRODUCTS = {"int8": (int8, (FEATURES * 64, 16 * 64 * 2)), "int4": (int4, (FEATURES * 32, 16 * 32 * 2, 16 * 32 * 2))}
SIZES = {f"{name}, {num_rows} rows": (name, num_rows) for name in PRODUCTS for num_rows in (1, 64)}


@pytest.mark.parametrize(("size", "target"), with_targets(SIZES))
def test_products_compile_well(size: str, target: str, compile_for: Compile) -> None:
    name, num_rows = SIZES[size]
    product, tiles = PRODUCTS[name]
    [kernel] = compile_for(target, lambda: product(num_rows))
    print(kernel)
    assert kernel.name == f"_multiply_{name}"
    assert kernel.spills == 0, kernel
    assert kernel.shared <= SHARED_LIMIT[target], kernel
    assert kernel.tensor_core > 0, kernel
    assert kernel.wide_copies >= sum(tile // (16 * kernel.threads) for tile in tiles), kernel
    assert kernel.halfword_copies == 0, kernel  # of 2 bytes, which are waited for in each step


@pytest.mark.parametrize(("name", "target"), with_targets(PRODUCTS, first="sm_100"))
def test_unpacking_compiles_well(name: str, target: str, compile_for: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    product, _ = PRODUCTS[name]
    monkeypatch.setattr("torch.nn.functional.linear", lambda x, weight: weight)
    [kernel] = compile_for(target, lambda: product(MAX_ROWS + 1))
    print(kernel)
    assert kernel.name == f"_unpack_{name}"
    assert kernel.spills == 0, kernel
    assert kernel.wide_stores > 0, kernel


# sm_80 and gfx942 have no fp8 (e4m3)
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("width", [4096, 16384])
def test_rows_in_fp8_compile_well(width: int, target: str, compile_for: Compile) -> None:
    [kernel] = compile_for(target, lambda: quantise_rows(torch.empty(8, width, dtype=torch.bfloat16)))
    print(kernel)
    assert kernel.spills == 0, kernel
    assert kernel.wide_copies >= width * 2 // (16 * kernel.threads), kernel


def test_nothing_is_compiled_while_a_request_waits(compile_for: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps, the largest decode step and the largest step, which run at start, compile all that later ones need."""
    monkeypatch.setattr("torch.nn.functional.linear", lambda x, weight: weight)

    def run(*counts: int) -> None:
        for num_rows in counts:
            for num_features, width in ((11008, 4096), (4096, 11008)):
                int8(num_rows, num_features, width)
                int4(num_rows, num_features, width)

    at_start = {kernel.binary: kernel.name for kernel in compile_for("sm_90", lambda: run(2, 256, 2048))}
    served = {kernel.binary: kernel.name for kernel in compile_for("sm_90", lambda: run(1, 16, 17, 200, 300))}
    assert served.items() <= at_start.items()
