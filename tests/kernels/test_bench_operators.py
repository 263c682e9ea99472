"""The checks of stage 2 of the kernel benchmark compare what serves with the references, and notice what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.bench import operators
from kernels.bench.measure import Stopwatch
from kernels.bench.operators import CHECKS, check, tasks
from kernels.bench.sizes import SMALL

# the function that each check calls
FUNCTIONS = {
    "RMSNorm": "rms_norm",
    "sum and RMSNorm": "add_rms_norm",
    "LayerNorm": "layer_norm",
    "sum and LayerNorm": "add_layer_norm",
    "SwiGLU": "swiglu",
    "sum of a product": "add_linear_",
    "gated residual": "gated_residual",
    "rotary positions and K/V store": "rotate_and_store",
    "K/V store": "kv_store",
    **{name: f"{name[:4]}_linear" for name in CHECKS if name.startswith("int")},
    "fp8": "fp8_linear",
    "rows in fp8": "quantise_rows",
}


def note(operator: str, dtype: str) -> str:
    torch.manual_seed(0)
    with torch.inference_mode():
        return check(Stopwatch(torch.device("cpu"), replays=1), SMALL, operator=operator, dtype=dtype).note


@pytest.mark.parametrize(("operator", "dtype"), [(name, dtype) for name, (_, all_) in CHECKS.items() for dtype in all_])
def test_an_operator_passes_its_check(operator: str, dtype: str) -> None:
    assert note(operator, dtype) == "ok"


def off_by_two_percent(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operator whose last result, or the cache that it writes, is off."""

    def run(*inputs: Any) -> Any:
        result = stock(*inputs)
        if result is None:
            inputs[2].mul_(1.02)
        return (
            (*result[:-1], 1.02 * result[-1])
            if isinstance(result, tuple)
            else None
            if result is None
            else 1.02 * result
        )

    return run


@pytest.mark.parametrize("operator", CHECKS)
def test_a_wrong_operator_is_noticed(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = FUNCTIONS[operator]
    monkeypatch.setattr(operators, name, off_by_two_percent(getattr(operators, name)))
    assert note(operator, "bfloat16").startswith("WRONG")


def test_a_key_that_is_not_stored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "kv_store", lambda *inputs: None)
    monkeypatch.setattr(
        operators, "rotate_and_store", lambda heads, value, *rest: heads[:, : heads.shape[1] - value.shape[1]]
    )
    for operator in ("K/V store", "rotary positions and K/V store"):
        assert note(operator, "float16").startswith("WRONG")


def test_each_check_is_a_task_of_its_own() -> None:
    assert len({task.key for task in tasks()}) == sum(len(dtypes) for _, dtypes in CHECKS.values())
