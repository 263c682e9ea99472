"""Seats that are taken from a sequence for a request that waits: every request ends, though the seat may be of no use."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.config import EngineConfig
from server.wire import Request, Sampling, Score
from tests.engine_client import Prompt, assert_all_released
from tests.engine_simulation import Simulation

# a block holds more tokens than a step computes: a sequence that is preempted may begin with its first token again
SMALL = EngineConfig(
    block_size=32, num_blocks=8, num_media_slots=8, max_sequences=1, max_tokens_per_step=16, max_model_len=128
)
PROMPTS = st.builds(
    Prompt,
    st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 12)), min_size=1, max_size=6).map(tuple),
    shots_attend=st.sampled_from(["previous", "alone"]),
)
SAMPLINGS = st.builds(
    lambda max_tokens, several: Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **several),
    st.integers(1, 8),
    st.sampled_from([{}, {}, {"n": 3}, {"beam_width": 2}, {"beam_width": 3}]),
)


def begin(simulation: Simulation, prompt: Prompt, sampling: Sampling, client: str = "", priority: int = 0) -> str:
    request = msgspec.structs.replace(prompt.request(simulation._name(), sampling), client=client, priority=priority)
    return add(simulation, request)


def begin_score(simulation: Simulation, prompt: Prompt, lengths: list[int], client: str = "", priority: int = 0) -> str:
    name = simulation._name()
    candidates = [[i + 1] * length for i, length in enumerate(lengths)]
    scored = prompt.request(name).prompt
    return add(simulation, Score(request_id=name, prompt=scored, candidates=candidates, client=client, priority=priority))


def add(simulation: Simulation, request: Request) -> str:
    simulation.num_frames.update(dict.fromkeys(request.prompt.media, 1))
    return simulation.add(request)


def assert_all_end(simulation: Simulation, max_steps: int = 1000) -> None:
    for _ in range(max_steps):
        if not simulation.engine.has_work():
            break
        simulation.step()
    assert_all_released(simulation.engine)
    accounts = simulation.engine.residents.shares
    assert not any(client.num_running for client in accounts._clients.values())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_ends(data: st.DataObject) -> None:
    """Prompts that share tokens and media, with very few seats, slots and blocks."""
    block_size = data.draw(st.sampled_from([4, 16, 32]))
    least = SMALL.max_model_len // block_size
    config = replace(
        SMALL,
        block_size=block_size,
        num_blocks=data.draw(st.integers(least, 2 * least)),
        num_media_slots=data.draw(st.integers(1, 3)),
        max_sequences=data.draw(st.integers(1, 3)),
        max_tokens_per_step=data.draw(st.sampled_from([16, 64, 512])),
        max_light_tokens=data.draw(st.sampled_from([8, 64, 256])),
        step_seconds=data.draw(st.sampled_from([0.05, float("inf")])),
    )
    simulation = Simulation(config)
    prompts = data.draw(st.lists(PROMPTS, min_size=1, max_size=3))
    for _ in range(data.draw(st.integers(2, 9))):
        prompt, client = data.draw(st.sampled_from(prompts)), data.draw(st.sampled_from(["", "a", "b"]))
        priority = data.draw(st.sampled_from([0, 0, 0, -1, 1]))
        if data.draw(st.integers(0, 2)):
            begin(simulation, prompt, data.draw(SAMPLINGS), client, priority)
        else:
            begin_score(simulation, prompt, data.draw(st.lists(st.sampled_from([1, 5, 9]), min_size=1)), client, priority)
        for _ in range(data.draw(st.integers(0, 5))):
            simulation.step()
    assert_all_end(simulation)
