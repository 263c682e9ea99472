"""The blocks of shots that attend alone: eviction, pins, prompts that need more than there are, and failed shots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import AlonePositions
from model.inference import prepare_for_inference
from server.engine.caches.spans import PromptSpans
from server.engine.device.sampler import NOT_FINITE
from server.engine.engine import Engine
from server.wire import Pin, Score
from tests.engine_client import CONFIG, IMAGES, Client, Prompt, assert_all_released, assert_equals_reference, client
from tests.server.engine.caches.test_spans import (
    ALONE,
    POSITIONS,
    PREFIX,
    QUERY,
    SHOTS,
    TOLERANCE,
    alone,
    ask,
    num_tokens,
)
from tests.tiny_models import CONFIGS, FAMILIES, Family, prompt_tokenizer, tiny_model


@pytest.mark.parametrize("alone_positions", POSITIONS)
def test_pinned_shots_stay_while_other_prompts_need_the_blocks(alone_positions: AlonePositions) -> None:
    answer = client("openflamingo", replace(CONFIG, num_blocks=40), alone_positions)
    ask(answer, "first", ALONE)
    pinned = ALONE.request("x").prompt
    answer.engine.pin(Pin(digests=[], is_kept=True, prompts=[pinned]))
    num_blocks = pinned.num_blocks(CONFIG.block_size, 0) - 1  # without the query
    gauges = answer.engine.gauges()
    assert gauges["kv_cache_pinned_bytes"] == num_blocks * answer.engine.runner._kv.blocks.nbytes / 40
    for image in range(3):
        ask(answer, f"plain {image}", Prompt(((image, 100),)))
    ask(answer, "again", alone(PREFIX, *SHOTS[::-1], (5, 2)))
    assert answer.admitted["again"].cached_tokens == num_tokens(PREFIX, *SHOTS)
    answer.engine.pin(Pin(digests=[], is_kept=False, prompts=[pinned]))
    for image in range(3, 6):
        ask(answer, f"plain {image}", Prompt(((image, 100),)))
    ask(answer, "evicted", ALONE)
    assert answer.admitted["evicted"].cached_tokens == 0


@pytest.mark.parametrize("alone_positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shot_of_which_the_end_was_evicted_is_completed(family: Family, alone_positions: AlonePositions) -> None:
    answer, prompt = client(family, alone_positions=alone_positions), alone(PREFIX, (1, 6), (0, 11), QUERY)
    ask(answer, "first", prompt)
    encoded, blocks = prompt.request("x").prompt, answer.engine.blocks
    keys = [answer.engine.media.content_keys.get(digest) or b"" for digest in encoded.media]
    spans = PromptSpans.of(encoded, keys, CONFIG.block_size, alone_positions)
    shot = max(spans.shots, key=lambda shot: len(shot.token_ids))
    last = blocks._block_of.pop(shot.hashes[-1])
    blocks._free.append(last)
    del blocks._hash_of[last], blocks._cached[last]
    ask(answer, "again", prompt)
    assert answer.admitted["again"].cached_tokens == num_tokens(PREFIX, (1, 6)) + 8
    assert_equals_reference(family, prompt, answer, "again", tolerance=TOLERANCE)
    assert_all_released(answer.engine)


def test_shots_that_need_more_blocks_than_there_are_are_refused() -> None:
    config = replace(CONFIG, num_blocks=32)
    prompt = alone(*[(0, 4)] * 20)  # 20 spans of five tokens, in two blocks each
    assert prompt.request("a").prompt.num_blocks(4, 6) == 19 * 2 + 3
    answer = client("flamingo", config)
    ask(answer, "a", prompt)
    assert answer.finished["a"].error == "the shots need 41 blocks, the engine has 32"
    answer.engine.add(Score(request_id="b", prompt=prompt.request("b").prompt, candidates=[[1, 2]]))
    answer.run()
    assert answer.finished["b"].error == "prompt and candidate need 41 blocks, the engine has 32"


@pytest.mark.parametrize("max_tokens_per_step", [13, 24, 40])
def test_a_shot_that_is_not_finite_is_found_in_no_cache(max_tokens_per_step: int) -> None:
    """Also if the piece that computes it ends in another shot, whose logits are finite."""
    model = tiny_model(CONFIGS["idefics"])
    config = replace(CONFIG, max_tokens_per_step=max_tokens_per_step)
    answer = Client(Engine(prepare_for_inference(model), prompt_tokenizer(), config), dict(IMAGES))
    prompt = alone(PREFIX, *SHOTS, (5, 9), QUERY)
    only_in_first = 7 * 4 % 256
    request = prompt.request("a")
    assert request.prompt.token_ids.count(only_in_first) == 1
    weights = model.language_model.embed.weight
    kept = weights[only_in_first].clone()
    weights[only_in_first] = torch.nan
    ask(answer, "media", Prompt(((0, 1), (1, 1), (2, 1), (3, 1), (5, 1))))
    ask(answer, "a", prompt)
    assert answer.finished["a"].error == NOT_FINITE
    weights[only_in_first] = kept
    ask(answer, "b", prompt)
    assert_equals_reference("idefics", prompt, answer, "b", tolerance=TOLERANCE)
    assert_all_released(answer.engine)
