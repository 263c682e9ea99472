"""The engine as on a GPU: plans of tiles, and decode steps that are recorded and replayed without their Python code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kernels import backend, paged_plan
from kernels.paged_plan import TilePlan
from server.engine.device.graphs import Step
from server.engine.engine import Engine
from tests.engine_client import (
    CONFIG,
    GREEDY,
    IMAGES,
    SERVED,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
)
from tests.recorded_steps import record_on_cpu
from tests.tiny_models import FAMILIES, Family, prompt_tokenizer

LIMITS = replace(CONFIG, max_sequences=4, max_model_len=24)
NUM_TOKENS = 3
# launches of the fused kernels in a recorded step: 4 layers, and 2 or (flamingo) 4 gated layers
FUSED: dict[Family, dict[str, int]] = {
    "openflamingo": {"_add_norm_row": 4 + 2},
    "idefics": {"_add_norm_row": 4 + 2, "_swiglu_block": 4 + 2, "_rotate_and_store": 4},
    "flamingo": {"_add_norm_row": 4 + 4, "_rotate_and_store": 4},
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut contexts into short parts, as long ones are, and compute nothing in the loops of a CPU."""
    monkeypatch.setattr(paged_plan, "SPLIT", 8)
    monkeypatch.setattr(backend, "numba", None)
    yield
    backend.select("auto")


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_equal_the_reference_and_share_what_they_read(family: Family) -> None:
    plans: list[Tensor] = []
    launches: list[Counter[str]] = []

    def record(step: Any) -> Step:
        replayed, plan = record_on_cpu(step, launches), step.args[0].plan
        assert isinstance(plan, TilePlan)
        assert plan.few is not None
        records = plan.few.records

        def replay() -> None:
            plans.append(records.clone())
            replayed()

        return replay

    answer = Client(Engine(SERVED[family], prompt_tokenizer(), LIMITS, record=record), dict(IMAGES))
    # the same beginning for all, and one whose shots attend alone
    prompts = [Prompt(((-1, 2), (0, 6), (1 + i, 2))) for i in range(3)]
    prompts.append(Prompt(((-1, 2), (0, 3), (1, 2)), shots_attend="alone"))
    sampling = msgspec.structs.replace(GREEDY, max_tokens=NUM_TOKENS)
    for i, prompt in enumerate(prompts):
        answer.engine.add(prompt.request(str(i), sampling))
        if not i:
            answer.step()
    answer.run()
    assert plans
    assert launches
    for counts in launches:
        assert {name: counts[name] for name in FUSED[family]} == FUSED[family]
    # the first part of several rows is one tile
    assert max(int(plan[:, 1].max()) for plan in plans) > 1
    backend.select("reference")
    for i, prompt in enumerate(prompts):
        assert_equals_reference(family, prompt, answer, str(i), NUM_TOKENS)
    assert_all_released(answer.engine)


def test_a_prefill_of_512_tokens_launches_no_empty_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of self-attention has 8 rows of two heads; one of media attention has 16 rows that read one image."""
    launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []

    def launch(kernel: InterpretedFunction, *args: Any, grid: tuple[int, ...], **_: Any) -> None:
        launches.append((kernel.fn.__name__, grid, args))

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    limits = replace(CONFIG, num_blocks=256, max_tokens_per_step=512, max_model_len=1024)
    engine = Engine(SERVED["idefics"], prompt_tokenizer(), limits)
    answer = Client(engine, dict(IMAGES))
    prompt = Prompt(((-1, 20), (0, 150), (1, 170), (2, 169)), max_tokens=1).request("a")
    assert len(prompt.prompt.token_ids) == 512
    answer.engine.add(prompt)
    answer.run()
    grids = {name: (grid, args) for name, grid, args in launches if args[0].shape[0] == 512}
    (num_tiles, num_kv_heads), args = grids["_attend_tile"]
    assert (num_tiles, num_kv_heads) == (512 // 8, 2)
    assert (args[7][:, 1] == 8).all()
    (num_media_tiles, _), args = grids["_forward"]
    assert num_media_tiles == 2 + 10 + 11 + 11
    assert (args[3][:, 1] > 0).all()
    assert "_merge_parts" not in grids
