"""Steps are long for a request that is alone and short next to others, and pieces of prompts have few lengths."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import mean

import pytest

from server.engine.pace import LONE_SECONDS, LONE_STEPS, MIN_PIECE, SHARE_BESIDE
from server.wire import BACKGROUND_PRIORITY
from tests.engine_simulation import Costs, Simulation
from tests.server.engine.test_scheduler import CONFIG


def test_a_lone_request_waits_for_nothing() -> None:
    """Every step of a lone request computes: the whole budget of a step with fast hardware, a bounded time with slow."""
    fast = Simulation(replace(CONFIG, step_seconds=10))
    began = len(fast.runner.plans)
    fast.run(fast.generate(4000, 4))
    counts = [plan.rows[0].count for plan in fast.runner.plans[began:] if plan.rows]
    assert counts == [512] * 7 + [4000 - 7 * 512 - CONFIG.block_size, 1, 1, 1]  # the first block was cached
    slow = Simulation(CONFIG)
    began = len(slow.runner.plans)
    slow.run(slow.generate(4000, 4))
    seconds = [slow.costs.of(plan) for plan in slow.runner.plans[began:] if plan.rows]
    assert max(seconds) < 1.5 * LONE_STEPS * CONFIG.step_seconds


def test_pieces_of_prompts_have_few_lengths() -> None:
    """A CPU compiles its products for each number of rows."""
    simulation = Simulation(CONFIG)
    began = len(simulation.runner.plans)
    names = [simulation.generate(length, 4) for length in (3000, 1111, 2345)]
    for name in names:
        simulation.run(name)
    rows = [row for plan in simulation.runner.plans[began:] for row in plan.rows]
    cut = {row.count for row in rows if row.count > 1 and row.start + row.count < len(row.sequence.prompt.token_ids)}
    assert len(cut) > 1
    assert all(count % (64 if count >= 128 else 32 if count >= 64 else 16) == 0 for count in cut if count >= 32)


def test_steps_are_short_for_some_time_after_two_requests_met() -> None:
    simulation = Simulation(CONFIG)
    simulation.generate(8000, 4)
    simulation.arrive(simulation.now + 0.5)
    began = len(simulation.runner.plans)
    simulation.run_until(simulation.now + LONE_SECONDS / 2)
    seconds = [simulation.costs.of(plan) for plan in simulation.runner.plans[began:] if plan.rows]
    assert max(seconds) < 1.5 * CONFIG.step_seconds
    simulation.run_until(simulation.now + LONE_SECONDS)
    seconds = [simulation.costs.of(plan) for plan in simulation.runner.plans[began:] if plan.rows]
    assert max(seconds) > 2 * CONFIG.step_seconds


def test_the_time_without_requests_counts_as_time_after_two_requests_met() -> None:
    simulation = Simulation(CONFIG)
    names = [simulation.generate(20, 4) for _ in range(2)]
    for name in names:
        simulation.run(name)
    simulation.runner.now += LONE_SECONDS
    simulation.generate(8000, 4)
    assert max(step_seconds(simulation, 1)) > 2 * CONFIG.step_seconds


def test_work_in_the_background_has_short_steps_although_it_is_alone() -> None:
    """Without this the first request that comes waits for a long step."""
    simulation = Simulation(CONFIG)
    simulation.run(simulation.generate(2000, 4))
    simulation.generate(8000, 4, priority=BACKGROUND_PRIORITY)
    seconds = step_seconds(simulation, 2)
    assert max(seconds) < 1.5 * CONFIG.step_seconds


def test_a_step_that_encodes_images_for_their_vectors_alone_is_short() -> None:
    simulation = Simulation(CONFIG)
    simulation.run(simulation.generate(8000, 4))
    simulation.embed(64)
    seconds = step_seconds(simulation, 0.5)
    assert max(seconds) < 2 * CONFIG.step_seconds < LONE_STEPS * CONFIG.step_seconds


def test_a_step_that_encodes_images_next_to_other_requests_is_shorter() -> None:
    simulation = Simulation(CONFIG)
    for name in [simulation.generate(20, 4) for _ in range(2)]:
        simulation.run(name)
    simulation.embed(64)
    seconds = step_seconds(simulation, 0.5)
    assert max(seconds) < 0.75 * CONFIG.step_seconds


@pytest.mark.parametrize("num_images", [0, 1])
@pytest.mark.parametrize("num_prompts", [1, 40])
def test_the_smallest_pieces_of_a_slow_machine_do_not_run_next_to_each_small_request(
    num_prompts: int, num_images: int
) -> None:
    """On a processor without wide vectors, the smallest piece of a long prompt takes longer than a step should."""
    slow = Costs(step=0.016, token=0.006, context=0.012, logits=0.001, frame=0.03)
    simulation, moments = Simulation(replace(CONFIG, step_seconds=0.03), slow), Random(0)
    alone = mean(simulation.arrive(simulation.now + 0.5, num_images) for _ in range(3))
    for _ in range(num_prompts):
        simulation.generate(8000, 4)
    simulation.run_until(simulation.now + 20)
    began = len(simulation.runner.plans)
    times = [simulation.arrive(simulation.now + 0.3 * moments.random(), num_images) for _ in range(20)]
    assert sorted(times)[18] <= 3 * alone
    pieces = [row.count for plan in simulation.runner.plans[began:] for row in plan.rows if row.count >= MIN_PIECE // 2]
    assert sum(pieces) > 20 * MIN_PIECE, "the long prompts advance"


def test_a_small_request_that_meets_long_prompts_first_waits_for_no_piece_of_them() -> None:
    """They have just computed without any other: their share next to the small request begins with that debt."""
    simulation = Simulation(replace(CONFIG, step_seconds=0.03))
    alone = mean(simulation.arrive(simulation.now + 0.5) for _ in range(3))
    for _ in range(5):
        simulation.generate(8000, 4)
    for _ in range(6):
        simulation.run_until(simulation.now + 4)
        began = len(simulation.runner.plans)
        assert simulation.arrive(simulation.now + 0.01) < 2.5 * alone
        shared = [plan for plan in simulation.runner.plans[began:] if len(plan.rows) > 1]
        assert not any(row.count >= 16 for plan in shared for row in plan.rows)


def test_pieces_are_shorter_where_the_smallest_one_takes_longer_than_a_step_should() -> None:
    """A small request waits for the piece during which it arrives."""
    slow = Costs(step=0.016, token=0.006, context=0.012, logits=0.001, frame=0.03)
    for costs, smallest in ((slow, MIN_PIECE // 2), (Costs(), MIN_PIECE)):
        simulation = Simulation(replace(CONFIG, step_seconds=0.05), costs)
        simulation.generate(2000, 4)
        simulation.run_until(simulation.now + 0.5)
        began = len(simulation.runner.plans)
        for _ in range(10):
            simulation.arrive(simulation.now + 0.1)
        pieces = [row.count for plan in simulation.runner.plans[began:] for row in plan.rows if row.start >= 100]
        assert min(count for count in pieces if count > 1) == smallest


def test_pieces_that_read_a_long_context_are_shorter() -> None:
    """The context of a piece, too, may take longer than a step should."""
    simulation = Simulation(replace(CONFIG, step_seconds=0.05), Costs(context=0.005))
    simulation.generate(8000, 4)
    simulation.run_until(simulation.now + 0.5)
    while simulation.engine.scheduler.running[0].num_computed < 7000:
        simulation.arrive(simulation.now + 0.1)
    pieces = [row for plan in simulation.runner.plans for row in plan.rows if row.count > 1]
    assert min(row.count for row in pieces if 500 < row.start < 1500) == MIN_PIECE
    assert min(row.count for row in pieces if row.start > 5000) == MIN_PIECE // 2


@pytest.mark.parametrize("costs", [Costs(), Costs(step=0.016, token=0.006, context=0.012, logits=0.001, frame=0.03)])
def test_the_first_step_after_the_start_is_the_only_long_one(costs: Costs) -> None:
    """Without a measured step, a piece of a prompt has all the tokens that a step may have."""
    simulation = Simulation(replace(CONFIG, step_seconds=0.03), costs)
    simulation.engine.scheduler.pace.forget()
    simulation.generate(6000, 4)
    _, *seconds = (second for second in step_seconds(simulation, 5) if second)
    assert max(seconds) < 1.2 * LONE_STEPS * 0.03


def test_the_time_of_the_first_frames_is_learned_at_once() -> None:
    simulation = Simulation(CONFIG)
    pace = simulation.engine.scheduler.pace
    pace.per_frame = 0.0
    simulation.run(simulation.generate(20, 1, num_images=1))
    assert pace.per_frame == pytest.approx(Costs().frame, rel=0.1)


def test_steps_with_frames_are_learned_from_though_their_frames_seem_to_take_no_time() -> None:
    simulation = Simulation(CONFIG)
    pace = simulation.engine.scheduler.pace
    pace.per_frame, pace.per_work = 0.0, 0.01
    for _ in range(400):
        pace.learn(20, 1, 0.046)
    assert pace.fixed + 20 * pace.per_work + pace.per_frame == pytest.approx(0.046, rel=0.1)


def test_a_short_step_corrects_an_overestimated_fixed_part_at_once() -> None:
    """Otherwise it allows long steps, whose errors correct the time per token."""
    simulation = Simulation(CONFIG)
    pace = simulation.engine.scheduler.pace
    pace.fixed = 0.16
    simulation.run(simulation.generate(20, 2))
    assert pace.fixed < 1.5 * Costs().step


@pytest.mark.parametrize("token", [0.002, 0.006, 0.02])
def test_large_prompts_have_no_more_than_their_share_where_their_smallest_piece_is_slow(token: float) -> None:
    """A piece may take many times what one step lends."""
    costs = Costs(step=0.016, token=token)
    simulation = Simulation(replace(CONFIG, step_seconds=0.03), costs)
    small = [simulation.generate(10, 40, client=f"small {i}") for i in range(3)]
    large = simulation.generate(8000, 4, client="large")
    began, start = len(simulation.runner.plans), simulation.now
    while simulation.now < start + 60:
        simulation.step()
        small = [simulation.generate(10, 40, client=n) if n in simulation.ended else n for n in small]
    rows = [row for plan in simulation.runner.plans[began:] for row in plan.rows if row.sequence.request_id == large]
    share = sum(map(costs._of_row, rows)) / (simulation.now - start)
    assert large not in simulation.ended
    assert 0.1 < share < SHARE_BESIDE / (1 + SHARE_BESIDE) + 0.05


def step_seconds(simulation: Simulation, seconds: float) -> list[float]:
    """Return how long the steps of the next `seconds` take."""
    began = len(simulation.runner.plans)
    simulation.run_until(simulation.now + seconds)
    return [simulation.runner.costs.of(plan) for plan in simulation.runner.plans[began:]]
