"""The pieces of a prompt with many images, in simulated time: none is small, since each reads all weights."""

from __future__ import annotations

from server.engine.pace import LONE_STEPS, MIN_PIECE
from server.engine.scheduler import MIN_PIECE_BEFORE_MEDIA
from server.wire import Generate, Sampling
from tests.engine_simulation import Costs, Simulation
from tests.server.engine.test_scheduler import CONFIG


def test_a_piece_of_a_prompt_with_many_images_is_not_small() -> None:
    """Images that a step has no time for come in steps of their own: each piece of the text reads all weights."""
    simulation = Simulation(CONFIG)
    simulation.runner.costs = Costs(frame=0.25)
    simulation.run(simulation.generate(20, 1, num_images=60))  # the pace is learned
    began = len(simulation.runner.plans)
    simulation.run(simulation.generate(20, 1, num_images=60))
    plans = simulation.runner.plans[began:]
    counts = [row.count for plan in plans for row in plan.rows]
    assert min(counts[:-1]) >= MIN_PIECE_BEFORE_MEDIA
    assert max(simulation.runner.costs.of(plan) for plan in plans) < 2 * LONE_STEPS * CONFIG.step_seconds


def test_requests_that_wait_for_the_same_shots_do_not_cut_their_prompt_into_small_pieces() -> None:
    """Each piece reads all weights, and the other requests can do nothing until the last one."""
    simulation = Simulation(CONFIG)
    first = simulation.generate(20, 1, num_images=16)
    shared = simulation.engine._sequence_tasks[first].first_sequence.prompt
    once = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
    for _ in range(3):
        simulation.add(Generate(request_id=simulation._name(), prompt=shared, sampling=once))
    simulation.run(first)
    counts = [row.count for plan in simulation.runner.plans for row in plan.rows if row.sequence.request_id == first]
    assert len(counts) <= 2, "one may be half as long as the time allows"


def test_a_machine_whose_steps_become_slow_does_not_cut_prompts_into_small_pieces() -> None:
    """Steps cost much, and their tokens little, while other programs have the cores: few long pieces are the cure."""
    simulation = Simulation(CONFIG)
    simulation.runner.costs = Costs(step=1.2, token=0.002)
    for _ in range(20):
        simulation.run(simulation.generate(512, 1))
    began = len(simulation.runner.plans)
    simulation.run(simulation.generate(512, 1))
    assert len(simulation.runner.plans) - began <= 5


def test_a_machine_whose_tokens_become_slow_cuts_prompts_into_short_steps() -> None:
    simulation = Simulation(CONFIG)
    costs = Costs(step=0.02, token=0.02)
    simulation.runner.costs = costs
    for _ in range(4):
        simulation.run(simulation.generate(512, 1))
    began = len(simulation.runner.plans)
    simulation.run(simulation.generate(512, 1))
    longest = max(map(costs.of, simulation.runner.plans[began:]))
    assert longest < 1.5 * LONE_STEPS * CONFIG.step_seconds + MIN_PIECE * costs.token


def test_a_prompt_of_a_lower_priority_has_whole_pieces() -> None:
    """It runs in every eighth step, which is none of those whose pieces have half their length."""
    simulation = Simulation(CONFIG)
    simulation.runner.costs = Costs(step=0.05)
    for _ in range(3):
        simulation.run(simulation.generate(512, 8))
    for _ in range(4):
        simulation.generate(20, 3000)
    yielding = simulation.generate(2000, 1, priority=1)
    simulation.run(yielding)
    rows = [row for plan in simulation.runner.plans for row in plan.rows if row.sequence.request_id == yielding]
    assert min(row.count for row in rows[:10]) >= 32
