"""Tests of the driver with a real engine of a tiny model, and of the statistics of an outcome."""

from __future__ import annotations

import pytest

from bench import random_models
from bench.driver import BenchFailed, Driver, Outcome, Trace
from bench.workload import Prompts, frames_of, greedy
from model.inference import prepare_for_inference
from model.prompt import PromptTokenizer
from server.engine.config import EngineConfig
from server.engine.engine import Engine

SIZE = random_models.SIZES["tiny"]
CONFIG = random_models.config("tiny", SIZE)


@pytest.fixture
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(random_models.tokenizer(SIZE), random_models.tokenizer(SIZE), CONFIG.prompt)


@pytest.fixture
def driver(tokenizer: PromptTokenizer) -> Driver:
    limits = EngineConfig(num_blocks=64, num_media_slots=16, max_model_len=512)
    return Driver(Engine(prepare_for_inference(random_models.random_model(CONFIG)), tokenizer, limits))


@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_every_request_gets_its_tokens_in_order(driver: Driver, tokenizer: PromptTokenizer, concurrency: int) -> None:
    prompts = Prompts(tokenizer).sharing_shots(5, 2)
    requests = [prompt.request(str(i), tokenizer, greedy(3)) for i, prompt in enumerate(prompts)]
    max_in_flight = 0
    add = driver.engine.add

    def counting_add(request: object) -> None:
        nonlocal max_in_flight
        add(request)  # type: ignore[arg-type]
        max_in_flight = max(max_in_flight, len(driver.engine.scheduler.running) + len(driver.engine.scheduler.waiting))

    driver.engine.add = counting_add  # type: ignore[method-assign]
    outcome = driver.run(requests, frames_of(prompts, CONFIG.vision), concurrency)
    assert [len(trace.token_ids) for trace in outcome.traces] == [3] * 5
    assert outcome.num_tokens == 15
    assert max_in_flight == min(concurrency, 5)
    assert all(trace.times == sorted(trace.times) and trace.times[0] >= trace.added for trace in outcome.traces)
    alone = driver.run(requests[:1], frames_of(prompts, CONFIG.vision), 1)
    assert alone.traces[0].token_ids == outcome.traces[0].token_ids


def test_a_rejected_request_fails_the_measurement(driver: Driver, tokenizer: PromptTokenizer) -> None:
    prompt = Prompts(tokenizer).new_prompt(())
    with pytest.raises(BenchFailed, match="exceed max_model_len 512"):
        driver.run([prompt.request("long", tokenizer, greedy(600))], {}, 1)


def test_the_decode_rate_covers_the_time_in_which_all_sequences_decode() -> None:
    early = Trace(added=0.0, token_ids=[1] * 5, times=[1.0, 2.0, 3.0, 4.0, 5.0])
    late = Trace(added=0.5, token_ids=[1] * 4, times=[3.0, 4.0, 5.0, 6.0])
    outcome = Outcome((early, late), seconds=6.0)
    assert outcome.tokens_per_second == 9 / 6
    assert outcome.first_token.values == (1.0, 2.5)
    assert outcome.between_tokens.values == (1.0,) * 7
    # Two tokens each from 3 s, when both have their first token, to 5 s, when the first sequence finishes.
    assert outcome.decode_tokens_per_second == 4 / 2
