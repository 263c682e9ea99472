"""If no sequence can run with what it holds, another one gives up what it holds, in the same step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.inference import prepare_for_inference
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.wire import BACKGROUND_PRIORITY, Finished, Score
from tests.engine_client import CONFIG, IMAGES, Client, Prompt, assert_all_released
from tests.engine_simulation import Simulation
from tests.tiny_models import CONFIGS, prompt_tokenizer, tiny_model

SMALL = EngineConfig(
    block_size=4, num_blocks=64, num_media_slots=1, max_sequences=8, max_tokens_per_step=24, max_model_len=256
)


def test_a_slot_that_a_preempted_sequence_releases_is_used_in_the_same_step() -> None:
    """Otherwise the step is empty, and the worker waits for a message before it tries again."""
    simulation = Simulation(SMALL)
    # it takes all blocks that are left, and holds the slot; the last one waits for more blocks than are left
    decoding = simulation.generate(8, max_tokens=240, num_images=1, priority=BACKGROUND_PRIORITY)
    while not simulation.token_times.get(decoding):
        simulation.step()
    prompt, waiting = simulation.generate(24, num_images=1), simulation.generate(240, priority=1)
    while simulation.engine.has_work():
        simulation.step()
        assert not simulation.engine.is_waiting_for_media()
    assert simulation.ended.keys() >= {decoding, prompt, waiting}
    assert_all_released(simulation.engine)


def ablated(num_media_slots: int) -> Client:
    """Return a client of a model whose tokens read all previous media: a sequence holds the pages of all of them."""
    config = CONFIGS["flamingo"]
    model = tiny_model(replace(config, gated=replace(config.gated, attends="all_previous")))
    limits = replace(CONFIG, num_media_slots=num_media_slots, max_frames_per_step=1, max_frames_idle=1)
    return Client(Engine(prepare_for_inference(model), prompt_tokenizer(), limits), dict(IMAGES))


def test_sequences_do_not_wait_for_each_others_slots() -> None:
    answer = ablated(num_media_slots=4)
    first, second = Prompt(((-1, 20), (0, 3), (1, 3), (2, 3))), Prompt(((-1, 21), (3, 4), (4, 4), (5, 4)))
    answer.engine.add(first.request("first"))
    answer.engine.add(second.request("second"))
    answer.run()
    assert all(len(answer.ids(name)) == 6 for name in ("first", "second"))
    assert_all_released(answer.engine)


@pytest.mark.parametrize("kind", ["generate", "score"])
def test_a_prompt_whose_pages_cannot_all_be_held_is_refused(kind: str) -> None:
    """A quarter of the slots may be pinned."""
    answer = ablated(num_media_slots=4)
    request = Prompt(((0, 3), (1, 3), (2, 3), (3, 3))).request("a")
    score = Score(request_id="a", prompt=request.prompt, candidates=[[1, 2]])
    answer.engine.add(score if kind == "score" else request)
    (event,) = answer.engine.step()
    assert isinstance(event, Finished)
    assert event.error == "the model reads the media of a prompt together: 4 do not fit into 3 of the 4 media slots"
