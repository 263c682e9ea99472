"""The warm-up runs every kind of row and leaves the engine empty."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.engine.plan import Plan
from server.engine.sampler import Result
from server.engine.warm_up import DIGEST, warm_up
from tests.engine_client import CONFIG, FEW_SHOT, IMAGE_TOKEN, assert_all_released, assert_equals_reference, client
from tests.tiny_models import FAMILIES, Family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_model_len", [16, 128])
def test_the_warm_up_ends_and_leaves_nothing(family: Family, max_model_len: int) -> None:
    answer = client(family, replace(CONFIG, max_model_len=max_model_len))
    engine = answer.engine
    warm_up(engine, IMAGE_TOKEN, image_size=8)
    assert not engine.has_work()
    assert engine.media.key(DIGEST) is not None
    assert engine.blocks.find(b"") is None
    assert not engine.blocks._hash_of
    assert_all_released(engine)


def test_a_prompt_is_computed_while_another_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = client("flamingo").engine
    kinds: list[set[bool]] = []
    run = engine.runner.run

    def watched(plan: Plan) -> list[Result]:
        kinds.append({row.count > 1 for row in plan.rows})
        return run(plan)

    monkeypatch.setattr(engine.runner, "run", watched)
    warm_up(engine, IMAGE_TOKEN, image_size=8)
    assert {True, False} in kinds
    assert {False} in kinds


def test_answers_after_the_warm_up_equal_the_reference() -> None:
    answer = client("idefics")
    warm_up(answer.engine, IMAGE_TOKEN, image_size=8)
    answer.engine.add(FEW_SHOT.request("a"))
    answer.run()
    assert_equals_reference("idefics", FEW_SHOT, answer, "a")
