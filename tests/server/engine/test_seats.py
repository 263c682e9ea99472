"""Few seats, slots and blocks: what a sequence loses is of use to another one, so that every request ends."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as with_fields

from server.engine.config import EngineConfig
from server.wire import Sampling, Score
from tests.engine_client import Prompt, assert_all_released
from tests.engine_simulation import Simulation

SMALL = EngineConfig(
    block_size=4, num_blocks=256, num_media_slots=8, max_sequences=1, max_tokens_per_step=512, max_model_len=128
)


def small_config(choices: random.Random) -> EngineConfig:
    """A sequence that is preempted may lose all that it has, if a block holds more tokens than a step computes."""
    block_size = choices.choice([4, 16, 32])
    least = SMALL.max_model_len // block_size
    return replace(
        SMALL,
        block_size=block_size,
        num_blocks=choices.randint(least, 2 * least),
        num_media_slots=choices.choice([1, 1, 2, 3, 8]),
        max_sequences=choices.randint(1, 3),
        max_tokens_per_step=choices.choice([16, 64, 512]),
        max_light_tokens=choices.choice([8, 64, 256]),
        step_seconds=choices.choice([0.03, float("inf")]),
    )


def small_prompt(choices: random.Random) -> Prompt:
    shots = tuple((choices.randint(-1, 4), choices.randint(1, 12)) for _ in range(choices.randint(1, 6)))
    return Prompt(shots, shots_attend=choices.choice(["previous", "alone"]))


def begin(simulation: Simulation, prompt: Prompt, choices: random.Random) -> None:
    """Add a request of any kind for a prompt."""
    name, client, priority = simulation._name(), choices.choice(["", "a", "b"]), choices.choice([0, 0, 0, -1, 1])
    if choices.random() < 0.66:
        n, beam_width = choices.choice([(1, 0), (1, 0), (3, 0), (1, 2), (1, 3)])
        max_tokens = choices.randint(1, 8)
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, n=n, beam_width=beam_width)
        simulation.add(with_fields(prompt.request(name, sampling), client=client, priority=priority))
    else:
        candidates = [[i + 1] * choices.choice([1, 5, 9]) for i in range(choices.randint(1, 9))]
        encoded = prompt.request(name).prompt
        simulation.add(Score(request_id=name, prompt=encoded, candidates=candidates, client=client, priority=priority))


# seeds of mixes that did not end: a seat was freed in every step for a request that could not use it; a stem, or a beam
# that was done, held the only slot; siblings took the seat from each other; blocks were taken that were too few; a stem
# held a block that its candidate lacked, or gave way to it although it only waited for pixels
@example(62)
@example(74)
@example(197)
@example(430)
@example(494)
@example(534)
@example(2273)
@example(3702)
@example(3906)
@example(100258)
@example(1000097)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_any_mix_of_prompts_that_share_tokens_and_media_ends(seed: int) -> None:
    choices = random.Random(seed)
    simulation = Simulation(small_config(choices))
    prompts = [small_prompt(choices) for _ in range(choices.randint(1, 3))]
    for prompt in prompts:
        simulation.num_frames.update(dict.fromkeys(prompt.request("").prompt.media, 1))
    for _ in range(choices.randint(2, 9)):
        begin(simulation, choices.choice(prompts), choices)
        for _ in range(choices.randint(0, 5)):
            simulation.step()
    for _ in range(1000):
        if simulation.engine.has_work():
            simulation.step()
    assert_all_released(simulation.engine)
    clients = simulation.engine.residents.shares._clients.values()
    assert not any(client.num_seats for client in clients)


def test_no_seat_is_taken_from_several_answers_for_a_request_of_a_lower_priority() -> None:
    simulation = Simulation(replace(SMALL, max_sequences=2))
    first = simulation.generate(20, 60, n=2)
    simulation.run_until(simulation.now + 0.1)
    yielding = simulation.generate(8, 4, client="other", priority=1)
    simulation.run(first)
    assert simulation.engine.residents.num_preemptions == 0
    simulation.run(yielding)


@pytest.mark.parametrize("max_sequences", [1, 2])
def test_candidates_get_a_seat_although_new_requests_never_cease(max_sequences: int) -> None:
    """A stem takes no seat, so its first candidate needs one as much as a new request does."""
    simulation, active = Simulation(replace(SMALL, max_sequences=max_sequences, max_tokens_per_step=16)), set[str]()
    scored = simulation.score(20, [100] * 2)
    for _ in range(2000):
        active.difference_update(set(simulation.ended))
        while len(active) < 3 * max_sequences:
            active.add(simulation.generate(8, 4, client=str(len(simulation.arrived) % 3)))
        simulation.step()
        if scored in simulation.ended:
            return
    raise AssertionError("the candidates have no seat")


def test_a_request_that_loses_its_seat_again_and_again_advances() -> None:
    """It computes again what its last block had, which takes more than one step: it keeps a seat for as long."""
    config = replace(SMALL, block_size=32, max_sequences=1, max_tokens_per_step=16)
    simulation, active = Simulation(config), set[str]()
    large = simulation.generate(90, 20)
    for _ in range(1500):
        active.difference_update(set(simulation.ended))
        while len(active) < 3:
            active.add(simulation.generate(8, 4))
        simulation.step()
    assert large in simulation.ended
    assert simulation.engine.residents.num_preemptions > 1


@pytest.mark.parametrize("max_sequences", [2, 3, 4])
def test_a_large_request_gets_and_keeps_one_of_the_seats_that_small_ones_want(max_sequences: int) -> None:
    config = replace(SMALL, num_blocks=4096, max_sequences=max_sequences, max_model_len=512, step_seconds=0.07)
    simulation, active, large = Simulation(config), set[str](), ""
    alone, began = simulation.run(simulation.generate(300, 60)), simulation.now + 1
    while large not in simulation.ended:
        active.difference_update(set(simulation.ended))
        while len(active) < 8:
            active.add(simulation.generate(20, 20))
        if not large and simulation.now >= began:
            large = simulation.generate(300, 60)
        simulation.step()
        assert simulation.now < began + 4 * alone
    assert simulation.engine.residents.num_preemptions == 0


@pytest.mark.parametrize(("num_tokens", "max_tokens", "longest"), [(300, 60, 3), (20, 200, 4)])
def test_a_large_request_has_its_share_of_the_time_of_the_only_seat(
    num_tokens: int, max_tokens: int, longest: int
) -> None:
    """It computes more than one token before a small request takes the seat, and small ones do not wait long for it."""
    config = replace(SMALL, num_blocks=4096, max_model_len=512, step_seconds=0.03)
    simulation, large = Simulation(config), ""
    alone = simulation.run(simulation.generate(num_tokens, max_tokens))
    small_alone = simulation.run(simulation.generate(20, 20))
    began, small = simulation.now + 1, [simulation.generate(20, 20)]
    while large not in simulation.ended:
        if small[-1] in simulation.ended:
            small.append(simulation.generate(20, 20))
        if not large and simulation.now >= began:
            large = simulation.generate(num_tokens, max_tokens)
        simulation.step()
        assert simulation.now < began + 6 * alone
    assert max(map(simulation.run, small)) < longest * small_alone


def test_a_request_that_waits_for_pixels_earns_no_time_with_the_only_seat() -> None:
    """Nothing runs meanwhile, so that a small request has the seat in the first step after its arrival."""
    simulation = Simulation(replace(SMALL, num_blocks=4096, max_model_len=512, step_seconds=0.03))
    waiting = simulation.generate(8, 4, num_images=1)
    for _ in range(100):
        simulation.engine.step()
    simulation.abort(waiting)
    large = simulation.generate(300, 100)
    simulation.run_until(simulation.now + 0.6)
    assert large not in simulation.ended
    small = simulation.generate(8, 4)
    simulation.step()
    assert [row.sequence.request_id for row in simulation.runner.plans[-1].rows] == [small]


@pytest.mark.parametrize("max_sequences", [1, 2, 4])
@pytest.mark.parametrize(("num_tokens", "max_tokens"), [(20, 60), (20, 200), (150, 60)])
def test_a_request_keeps_its_share_of_the_seats_next_to_smaller_ones(
    num_tokens: int, max_tokens: int, max_sequences: int
) -> None:
    """It is light when it arrives, and smaller ones never cease."""
    config = replace(SMALL, num_blocks=4096, max_sequences=max_sequences, max_model_len=512, step_seconds=0.03)
    simulation, active, larger = Simulation(config), set[str](), ""
    alone, began = simulation.run(simulation.generate(num_tokens, max_tokens)), simulation.now + 1
    while larger not in simulation.ended:
        active.difference_update(set(simulation.ended))
        while len(active) < 2 * max_sequences:
            active.add(simulation.generate(20, 20))
        if not larger and simulation.now >= began:
            larger = simulation.generate(num_tokens, max_tokens)
        simulation.step()
        assert simulation.now < began + 6 * alone


def test_a_computed_stem_gives_no_seat_and_keeps_its_work() -> None:
    """Its candidate has the seat that another client gets."""
    simulation = Simulation(replace(SMALL, max_sequences=2, max_tokens_per_step=16))
    names = [simulation.generate(20, 60, client="busy"), simulation.score(20, [100] * 2, client="busy")]
    running = simulation.engine.scheduler.running
    while len(running) < 3:
        simulation.step()
    stem = next(sequence for sequence in running if sequence.is_stem)
    names.append(simulation.generate(8, 4, client="other"))
    simulation.step()
    assert names[-1] in [row.sequence.request_id for row in simulation.runner.plans[-1].rows]
    assert stem.is_computed
    for name in names:
        simulation.run(name)


@pytest.mark.parametrize("num_clients", [1, 10])
def test_searches_with_more_beams_than_seats_run_together(num_clients: int) -> None:
    """They are not slower than one after the other, and beams are not computed again in every step."""
    simulation = Simulation(replace(SMALL, num_blocks=4096, max_sequences=6))
    searches = [simulation.generate(20, 60, client=str(i % num_clients), beam_width=4) for i in range(10)]
    before = len(simulation.runner.plans)
    for search in searches:
        simulation.run(search)
    rows = [len(plan.rows) for plan in simulation.runner.plans[before:]]
    assert max(rows) == 6
    assert len(rows) <= 10 * 60 * 4 / 5
    assert simulation.engine.residents.num_preemptions <= len(rows) / 3


@pytest.mark.parametrize(("max_sequences", "beam_width"), [(3, 4), (4, 3), (16, 8)])
def test_a_search_advances_next_to_requests_that_never_cease(max_sequences: int, beam_width: int) -> None:
    """One beam lost its seat to them, and the others waited for it with theirs."""
    simulation, active = Simulation(replace(SMALL, num_blocks=4096, max_sequences=max_sequences)), set[str]()
    search = simulation.generate(20, 20, client="search", beam_width=beam_width)
    for _ in range(20 * beam_width * 2):
        active.difference_update(simulation.ended)
        while len(active) < 2 * max_sequences:
            active.add(simulation.generate(8, 4, client=str(len(simulation.arrived) % 3)))
        simulation.step()
    assert search in simulation.ended
    assert max(len(plan.rows) for plan in simulation.runner.plans) <= max_sequences


def test_the_beams_of_a_search_leave_a_seat_to_a_new_request() -> None:
    simulation = Simulation(replace(SMALL, max_sequences=4))
    alone = simulation.run(simulation.generate(8, 4))
    simulation.generate(20, 100, beam_width=8)
    simulation.run_until(simulation.now + 0.2)
    assert simulation.run(simulation.generate(8, 4)) <= 3 * alone


def test_a_search_loses_its_seat_with_all_of_its_beams() -> None:
    simulation = Simulation(replace(SMALL, max_sequences=1))
    search = simulation.generate(20, 100, beam_width=4)
    simulation.run_until(simulation.now + 1)
    small = simulation.generate(8, 4)
    simulation.step()
    assert [row.sequence.request_id for row in simulation.runner.plans[-1].rows] == [small]
    simulation.run(search)


def test_a_small_search_of_another_client_does_not_wait_for_large_ones() -> None:
    config = replace(SMALL, num_blocks=8192, max_sequences=32, max_model_len=1024, step_seconds=0.07)
    simulation = Simulation(config)
    alone = simulation.run(simulation.generate(20, 4, client="other", beam_width=3))
    for _ in range(10):
        simulation.generate(400, 400, client="crowd", beam_width=8)
    simulation.run_until(simulation.now + 1)
    for _ in range(3):
        assert simulation.run(simulation.generate(20, 4, client="other", beam_width=3)) <= 3 * alone
