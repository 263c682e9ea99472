"""Stage 2 of the kernel benchmark launches each kernel between attentions, and finds the results right."""

from __future__ import annotations

import pytest
import torch

from kernels import weight_only_gpu
from kernels.backend import TABLE, Launch
from kernels.bench import tuning
from kernels.bench.measure import Stopwatch
from kernels.bench.operators import CHECKS, check
from kernels.bench.sizes import SMALL

# of `rows.py`, `self_attention.py`, `weight_only_gpu.py` and `fp8.py`, without those of a backward pass
KERNELS = {
    "_norm_row", "_add_norm_row", "_swiglu_block", "_add_gated", "_store_token", "_rotate_and_store", "_multiply_int8",
    "_multiply_int4", "_unpack_int8", "_unpack_int4", "_quantise_row",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_kernels_are_checked(dtype: str, launches: list[str]) -> None:
    watch = Stopwatch(torch.device("cpu"), replays=1)
    with torch.inference_mode():
        notes = {
            operator: check(watch, SMALL, operator=operator, dtype=dtype).note
            for operator, (_, dtypes) in CHECKS.items()
            if dtype in dtypes
        }
    assert set(notes.values()) == {"ok"}, notes
    assert set(launches) == KERNELS


def test_a_product_is_measured_with_the_launch_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Launch] = []
    stock = weight_only_gpu._launch

    def launch(operator: str, x: torch.Tensor) -> Launch:
        tried.append(stock(operator, x))
        return tried[-1]

    monkeypatch.setattr(weight_only_gpu, "_launch", launch)
    before = dict(TABLE)
    watch = Stopwatch(torch.device("cpu"), replays=1)
    tasks = {
        task.arguments["operator"]: task
        for task in tuning.tasks(SMALL)
        if task.function.endswith(":measure_packed") and task.launch is not None and task.launch["num_warps"] == 8
    }
    assert tasks.keys() >= {"int4", "int8"}
    for task in tasks.values():
        tried.clear()
        assert tuning.measure_packed(watch, SMALL, **task.arguments).value > 0
        assert task.launch is not None
        assert {(each.block, each.num_warps, each.num_stages) for each in tried} == {
            (task.launch["block"], 8, task.launch["num_stages"])
        }
    assert before == TABLE
