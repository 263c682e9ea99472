"""The gains and costs of proposed tokens in simulated time, alone and next to other requests."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from server.engine.config import EngineConfig
from tests.engine_simulation import Simulation

NUM_LEARNT = 8  # requests with which a simulation begins


def simulated(speculative_tokens: int, token_at: Callable[[int], int] = lambda number: 5) -> Simulation:
    config = EngineConfig(step_seconds=0.03, speculative_tokens=speculative_tokens)
    return Simulation(config, token_at=token_at)


def test_an_answer_that_repeats_itself_takes_less_than_half_of_the_time() -> None:
    seconds = {
        count: simulation.run(simulation.generate(100, max_tokens=200))
        for count in (0, 4)
        if (simulation := simulated(count))
    }
    assert seconds[4] < seconds[0] / 2


def test_an_answer_that_does_not_repeat_itself_takes_as_long_as_without_proposals() -> None:
    def token_at(number: int) -> int:
        return 10 + number

    with_, without = simulated(4, token_at), simulated(0, token_at)
    seconds = with_.run(with_.generate(100, max_tokens=200))
    assert seconds == pytest.approx(without.run(without.generate(100, max_tokens=200)))
    assert not any(row.proposed for plan in with_.runner.plans for row in plan.rows if row.count == 1)


@pytest.mark.parametrize("alphabet", [2, 3, 4, 8, 16])
def test_proposals_that_are_mostly_wrong_cost_few_per_cent(alphabet: int) -> None:
    """In tokens drawn at random, ends of two tokens occur again, and are followed by what they were followed by seldom."""
    drawn = random.Random(alphabet).choices(range(10, 10 + alphabet), k=1200)
    seconds = {
        count: simulation.run(simulation.generate(100, max_tokens=1200))
        for count in (0, 4)
        if (simulation := simulated(count, drawn.__getitem__))
    }
    assert seconds[4] < 1.03 * seconds[0]


@pytest.mark.parametrize("num_repeating", [1, 4])
def test_proposals_delay_a_neighbour_by_half_of_a_step_at_most(num_repeating: int) -> None:
    gaps: dict[int, float] = {}
    for count in (0, 8):
        simulation = simulated(count)
        for _ in range(num_repeating):
            simulation.generate(100, max_tokens=1500)
        neighbour = simulation.generate(100, max_tokens=100, min_tokens=100)  # has no proposals
        simulation.run(neighbour)
        times = simulation.token_times[neighbour]
        gaps[count] = (times[-1] - times[0]) / (len(times) - 1)
        assert len(simulation.ended) == NUM_LEARNT + 1  # the others still run
    assert gaps[0] < gaps[8] <= 1.5 * gaps[0]


@pytest.mark.parametrize("num_repeating", [1, 2, 4, 8])
def test_proposals_delay_a_new_request_by_half_of_its_time_at_most(num_repeating: int) -> None:
    seconds: dict[int, list[float]] = {}
    for count in (0, 8):
        simulation = simulated(count)
        for _ in range(num_repeating):
            simulation.generate(100, max_tokens=1000)
        began = simulation.now
        seconds[count] = [simulation.arrive(began + 0.7 + 0.3 * number) for number in range(3)]
    assert sum(seconds[8]) <= 1.5 * sum(seconds[0])
