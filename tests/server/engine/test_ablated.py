"""The paper's ablated parts are served like any model: the engine's greedy tokens are the reference's."""

from __future__ import annotations

import pytest

from model.inference import prepare_for_inference
from model.reference import generate
from server.engine.engine import Engine
from tests.engine_client import CONFIG, FEW_SHOT, IMAGE_TOKEN, IMAGES, Client, assert_all_released
from tests.model.test_ablated import ABLATED
from tests.tiny_models import prompt_tokenizer, tiny_model


@pytest.mark.parametrize("name", ABLATED)
def test_greedy_tokens_equal_the_reference(name: str) -> None:
    model = tiny_model(ABLATED[name])
    request, pixels = FEW_SHOT.request("a"), FEW_SHOT.pixels(model)
    expected = generate(
        model, request.prompt.token_ids, request.prompt.media_index, pixels, max_tokens=6, suppressed_ids=[IMAGE_TOKEN]
    )
    answer = Client(Engine(prepare_for_inference(model), prompt_tokenizer(), CONFIG), dict(IMAGES))
    answer.engine.add(request)
    answer.run()
    assert answer.ids("a") == expected.token_ids
    assert_all_released(answer.engine)
