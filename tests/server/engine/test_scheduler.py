"""The schedule in simulated time: no request starves another one, whatever else runs, and nothing stands still."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.config import EngineConfig
from server.engine.pace import LONE_STEPS
from server.engine.residents import PATIENCE
from server.engine.scheduler import YIELD_EVERY
from server.wire import BACKGROUND_PRIORITY, Generate, Sampling
from tests.engine_client import assert_all_released
from tests.engine_simulation import Costs, Simulation

CONFIG = EngineConfig(
    block_size=4,
    num_blocks=11_000,
    num_media_slots=512,
    max_sequences=64,
    max_tokens_per_step=512,
    max_model_len=8192,
    step_seconds=0.07,
)
Attack = Callable[[Simulation], object]

ATTACKS: dict[str, Attack] = {
    "long prompt": lambda s: s.generate(8000, 100),
    "prompt log-probabilities": lambda s: s.generate(8000, 1, prompt_logprobs=0),
    "many answers": lambda s: s.generate(2000, 300, n=16),
    "beams": lambda s: s.generate(2000, 300, beam_width=8),
    "candidates": lambda s: s.score(1000, [1000] * 64),
    "long prompts": lambda s: [s.generate(1000, 50) for _ in range(40)],
    "many answers to long prompts": lambda s: [s.generate(3000, 100, n=8) for _ in range(16)],
    "images": lambda s: [s.generate(20, 50, num_images=60) for _ in range(4)],
    "videos": lambda s: s.generate(20, 50, num_images=16, num_frames=60),
}


@pytest.mark.parametrize(
    ("attack", "num_images"),
    [
        *((attack, 0) for attack in ATTACKS),
        *((attack, 1) for attack in ("long prompt", "many answers", "images", "videos")),
    ],
)
def test_a_small_request_takes_at_most_thrice_its_time_alone(attack: str, num_images: int) -> None:
    simulation, moments = Simulation(CONFIG), random.Random(0)
    alone = mean(simulation.arrive(simulation.now + 0.5, num_images) for _ in range(3))
    ATTACKS[attack](simulation)
    times = [simulation.arrive(simulation.now + 0.2 * moments.random(), num_images) for _ in range(20)]
    assert sorted(times)[18] <= 3 * alone
    assert simulation.engine.has_work(), "the attack ended before the last request"


@pytest.mark.parametrize("num_images", [0, 1])
def test_a_client_that_comes_back_is_not_slowed_down_by_many_new_requests_of_another(num_images: int) -> None:
    """Each request of the crowd has had little, but its client has had much."""
    simulation, moments = Simulation(CONFIG), random.Random(0)
    alone = mean(simulation.arrive(simulation.now + 0.5, num_images, "one") for _ in range(3))
    for _ in range(40):
        simulation.generate(20, 2000, n=16, client="crowd")
    simulation.run_until(simulation.now + 1)
    times = [simulation.arrive(simulation.now + 0.2 * moments.random(), num_images, "one") for _ in range(20)]
    assert sorted(times)[18] <= 3 * alone
    assert simulation.engine.has_work(), "the crowd ended before the last request"


def test_requests_of_another_client_have_half_of_the_work() -> None:
    simulation = Simulation(CONFIG)
    for _ in range(40):
        simulation.generate(500, 20, client="crowd")
    for _ in range(10):
        simulation.generate(700, 20, client="one")
    simulation.run_until(simulation.now + 1)
    served = work_by_client(simulation, 8)
    assert served["one"] == pytest.approx(served["crowd"], rel=0.1)


def work_by_client(simulation: Simulation, seconds: float) -> dict[str, float]:
    clients = simulation.engine.scheduler._shares._clients
    before = {name: client.served for name, client in clients.items()}
    simulation.run_until(simulation.now + seconds)
    return {name: client.served - before.get(name, 0.0) for name, client in clients.items()}


def test_a_client_that_was_idle_has_saved_nothing_up() -> None:
    simulation = Simulation(CONFIG)
    busy = simulation.generate(20, 3000, client="busy")
    simulation.run_until(simulation.now + 10)
    simulation.generate(8000, 10, client="late")
    began = len(simulation.token_times[busy])
    simulation.run_until(simulation.now + 2)
    assert len(simulation.token_times[busy]) - began > 10


def test_a_small_request_of_a_new_client_is_served_before_those_of_a_client_that_had_much() -> None:
    simulation = Simulation(CONFIG)
    for _ in range(400):
        simulation.generate(100, 4, client="crowd")
    simulation.run_until(simulation.now + 1)
    assert simulation.arrive(simulation.now, client="other") < 1


@pytest.mark.parametrize(
    ("large", "small", "num_others", "max_sequences"),
    [
        ((4000, 50), (20, 20), 1, 64),
        ((4000, 50), (20, 20), 8, 64),
        ((2000, 4), (300, 4), 16, 64),
        ((300, 4), (20, 4), 8, 1),
        ((20, 60), (20, 4), 8, 4),
        ((20, 200), (20, 4), 8, 4),
        ((200, 4), (20, 4), 8, 4),
        ((200, 4), (20, 4), 16, 64),
    ],
)
def test_a_larger_request_advances_next_to_small_ones(
    large: tuple[int, int], small: tuple[int, int], num_others: int, max_sequences: int
) -> None:
    """Small requests of its client without end, as many as the engine can serve, leave it a share of the time and seats."""
    simulation, active = Simulation(replace(CONFIG, max_sequences=max_sequences)), set[str]()
    alone = simulation.run(simulation.generate(*large))
    began, name = simulation.now + 1, ""
    while name not in simulation.ended and simulation.now < began + 8 * alone:
        active.difference_update(set(simulation.ended))
        while len(active) < num_others:
            active.add(simulation.generate(*small))
        if not name and simulation.now >= began:
            name = simulation.generate(*large)
        simulation.step()
    assert name in simulation.ended


def test_a_lower_priority_yields_and_does_not_starve() -> None:
    simulation = Simulation(CONFIG)
    first = simulation.generate(20, 1000)
    yielding = simulation.generate(20, 1000, priority=1)
    background = simulation.generate(20, 1000, priority=BACKGROUND_PRIORITY)
    simulation.run(first)
    taken = [len(simulation.token_times[name]) for name in (first, yielding, background)]
    assert taken[1] <= taken[0] / YIELD_EVERY + 2
    assert min(taken[1:]) >= taken[0] / YIELD_EVERY / 4
    simulation.run(background)


def test_a_prompt_is_not_awaited_that_a_lower_priority_computes() -> None:
    """Next to other requests, a lower priority computes it in few steps."""
    simulation = Simulation(CONFIG)
    sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    simulation.generate(20, 4000, client="other")
    alone = simulation.generate(4000)
    simulation.run(alone)
    prompt = simulation._prompt(4000, 0)
    background = Generate(request_id="a", prompt=prompt, sampling=sampling, priority=BACKGROUND_PRIORITY)
    simulation.add(background)
    simulation.run_until(simulation.now + 0.2)
    shared = simulation.add(Generate(request_id="b", prompt=prompt, sampling=sampling))
    simulation.run(shared)
    seconds, seconds_alone = (simulation.ended[name] - simulation.arrived[name] for name in (shared, alone))
    assert seconds <= 1.1 * seconds_alone
    simulation.run("a")


@pytest.mark.parametrize("num_requests", [1, 2])
def test_no_seat_is_taken_for_a_request_of_a_lower_priority(num_requests: int) -> None:
    """The request that loses the seat would come first again, and lose its work in every step."""
    simulation = Simulation(replace(CONFIG, max_sequences=num_requests))
    first = [simulation.generate(2000, 300) for _ in range(num_requests)]
    simulation.run_until(simulation.now + 1)
    yielding = simulation.generate(20, 4, client="other", priority=1)
    for name in first:
        simulation.run(name)
    assert simulation.engine.residents.num_preemptions == 0
    simulation.run(yielding)


def test_a_client_that_needs_little_saves_up_no_more_than_an_idle_one() -> None:
    """One answer needs a token per step. Otherwise, later requests of its client would go before all others for long."""
    simulation = Simulation(CONFIG)
    slow = simulation.generate(20, 4000, client="slow")
    for _ in range(40):
        simulation.generate(1000, 50, client="busy")
    simulation.run_until(simulation.now + 60)
    assert slow not in simulation.ended
    for _ in range(40):
        simulation.generate(500, 4, client="slow")
    assert simulation.arrive(simulation.now, client="busy") < 1
    assert simulation.arrive(simulation.now, client="new") < 0.5


def test_the_pace_follows_the_machine() -> None:
    """On a machine that becomes four times slower, steps are soon as short as before."""
    simulation = Simulation(CONFIG)
    simulation.generate(8000, 4)
    simulation.run_until(simulation.now + 1)
    costs = Costs()
    simulation.runner.costs = Costs(
        *(4 * seconds for seconds in (costs.step, costs.token, costs.context, costs.logits))
    )
    simulation.run_until(simulation.now + 5)
    began = len(simulation.runner.plans)
    simulation.run_until(simulation.now + 1)
    longest = max(map(simulation.runner.costs.of, simulation.runner.plans[began:]))
    assert longest < 2 * LONE_STEPS * CONFIG.step_seconds


def test_a_request_gets_a_seat_where_another_holds_all() -> None:
    simulation = Simulation(replace(CONFIG, max_sequences=8))
    simulation.generate(20, 2000, n=8)
    simulation.run_until(simulation.now + 1)
    assert len(simulation.engine.scheduler.running) == 8
    assert simulation.arrive(simulation.now) < 0.3
    simulation.generate(300, 2000)
    simulation.run_until(simulation.now + 0.5)
    assert len({sequence.request_id for sequence in simulation.engine.scheduler.running}) == 2


def test_candidates_leave_seats_to_requests_that_wait() -> None:
    simulation = Simulation(replace(CONFIG, max_sequences=8))
    simulation.score(100, [400] * 64)
    simulation.run_until(simulation.now + 1)
    assert simulation.arrive(simulation.now) < 0.3


def test_small_requests_pass_one_that_waits_for_blocks_but_not_for_ever() -> None:
    """A prompt that needs all blocks gets them after the work of `PATIENCE`, although small requests never cease."""
    config = replace(CONFIG, num_blocks=512, max_model_len=2048)
    simulation, active = Simulation(config), set[str]()

    def keep_busy() -> None:
        active.difference_update(set(simulation.ended))
        while len(active) < 8:
            active.add(simulation.generate(40, 40))

    keep_busy()
    simulation.run_until(simulation.now + 1)
    large = simulation.generate(2000, 40)
    ended_before = len(simulation.ended)
    total = simulation.engine.scheduler._shares.total
    while not any(sequence.request_id == large for sequence in simulation.engine.scheduler.running):
        keep_busy()
        simulation.step()
        assert simulation.engine.scheduler._shares.total - total < 3 * PATIENCE
    assert len(simulation.ended) > ended_before, "small requests have passed"
    for _ in range(20_000):
        if large in simulation.ended:
            break
        keep_busy()
        simulation.step()
    assert large in simulation.ended


def test_a_stem_that_waits_for_blocks_gives_its_own_to_a_heavy_request_that_needs_them() -> None:
    """Neither could continue otherwise: the stem is light, so the heavy one spares it, and nothing else runs."""
    simulation = Simulation(replace(CONFIG, num_blocks=170, max_model_len=640))
    names = [simulation.generate(500, 60), simulation.score(149, [33])]
    for name in names:
        simulation.run(name)
    assert_all_released(simulation.engine)


def test_a_full_queue_of_many_clients_is_served_as_fast_as_a_short_one() -> None:
    """Decoding has the time that prompts leave: with few free seats, half of each step would be unused otherwise."""
    rates = [num_served(num_requests) for num_requests in (CONFIG.max_sequences, 10 * CONFIG.max_sequences)]
    assert rates[1] > 0.97 * rates[0]


def num_served(num_requests: int) -> int:
    """Return how many small requests of many clients end in some seconds while there are `num_requests` at any time."""
    simulation, clients = Simulation(CONFIG), random.Random(1)
    began, num_before = simulation.now, simulation.num_requests
    while simulation.now < began + 8:
        while simulation.num_requests - len(simulation.ended) < num_requests:
            simulation.generate(6, 8, client=f"{clients.randrange(64)}")
        simulation.step()
    return len(simulation.ended) - num_before


def test_scored_positions_are_computed_once_although_the_sequence_is_preempted() -> None:
    simulation = Simulation(CONFIG)
    request_id = simulation.generate(1000, 1, prompt_logprobs=0)
    simulation.run_until(simulation.now + 0.3)
    (sequence,) = simulation.engine.scheduler.running
    num_computed = sequence.num_computed
    assert num_computed > 100
    simulation.engine.residents.preempt(sequence)
    began = len(simulation.runner.plans)
    simulation.run(request_id)
    rows = [row for plan in simulation.runner.plans[began:] for row in plan.rows]
    assert sum(row.count for row in rows) <= 1000 - num_computed + CONFIG.block_size


requests = st.tuples(
    st.sampled_from([8, 20, 60, 200, 500]),
    st.sampled_from([1, 3, 20, 60]),
    st.sampled_from([{}, {}, {}, {"n": 3}, {"n": 12}, {"beam_width": 3}, {"prompt_logprobs": 0}]),
    st.integers(0, 3),
    st.sampled_from(["", "a", "b"]),
    st.sampled_from([0, 0, 0, 1, BACKGROUND_PRIORITY]),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_ends_and_no_token_waits_for_long(data: st.DataObject) -> None:
    """Mixes with few blocks, seats and slots: each step does something, and each request ends in bounded steps."""
    config = replace(
        CONFIG,
        num_blocks=data.draw(st.integers(170, 600)),
        num_media_slots=data.draw(st.integers(3, 20)),
        max_sequences=data.draw(st.integers(1, 20)),
        max_tokens_per_step=data.draw(st.integers(16, 512)),
        max_model_len=640,
        max_light_tokens=data.draw(st.sampled_from([0, 64, 256])),
        step_seconds=data.draw(st.sampled_from([0.01, 0.075, float("inf")])),
    )
    simulation = Simulation(config)
    names: dict[str, int] = {}
    for num_tokens, max_tokens, sampling, num_images, client, priority in data.draw(
        st.lists(requests, min_size=1, max_size=12)
    ):
        name = simulation.generate(num_tokens, max_tokens, num_images, client, priority, **sampling)
        names[name] = priority
        for _ in range(data.draw(st.integers(0, 4))):
            simulation.step()
    simulation.score(data.draw(st.integers(8, 200)), data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=30)))
    num_idle = 0
    for _ in range(20_000):
        if not simulation.engine.has_work():
            break
        before = len(simulation.runner.plans)
        simulation.step()
        is_idle = not any(plan.rows or plan.pieces for plan in simulation.runner.plans[before:])
        num_idle = num_idle + 1 if is_idle else 0
        assert num_idle < 5, "work waits, and nothing runs"
    assert names.keys() <= simulation.ended.keys()
    assert_all_released(simulation.engine)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_an_active_request_waits_a_bounded_time_for_its_next_token(data: st.DataObject) -> None:
    """With enough blocks, a decoding request of the first priority waits for no more than a few long steps."""
    simulation = Simulation(CONFIG)
    chosen = data.draw(st.lists(requests, min_size=2, max_size=20))
    decoding = simulation.generate(20, 150)
    for num_tokens, max_tokens, sampling, num_images, _, priority in chosen:
        simulation.generate(num_tokens, max_tokens, num_images, "", priority, **sampling)
        for _ in range(data.draw(st.integers(0, 4))):
            simulation.step()
    simulation.run(decoding)
    gaps = [later - earlier for earlier, later in pairwise(simulation.token_times[decoding])]
    assert max(gaps) < 10 * CONFIG.step_seconds
