"""Side work in simulated time: it has its share next to sequences, and no client takes that of another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from math import inf
from statistics import mean

import pytest

from server.engine.pace import MAX_DEBT, SHARE_BESIDE
from server.engine.side_work import CREDIT
from server.engine.tasks.task import ROUNDS_PER_STEP, ForwardTask
from server.wire import Outbound
from tests.engine_simulation import Costs, Simulation
from tests.server.engine.test_scheduler import CONFIG


class EndlessForward(ForwardTask):
    """A forward of its own whose pieces take some simulated time, and count as `tokens`."""

    def __init__(
        self, simulation: Simulation, piece_seconds: float, name: str = "forward", tokens: float = 1.0
    ) -> None:
        self.simulation, self.piece_seconds, self.seconds, self.tokens = simulation, piece_seconds, 0.0, tokens
        super().__init__(name, (), CONFIG, num_layers=2)

    @property
    def can_run(self) -> bool:
        return True

    def pieces(self) -> Generator[float, None, Iterable[Outbound]]:
        while True:
            self.simulation.runner.now += self.piece_seconds
            self.seconds += self.piece_seconds
            yield self.tokens


@pytest.mark.parametrize("piece_seconds", [0.0005, 0.05])
def test_a_forward_of_its_own_has_a_share_of_the_time_next_to_rows(piece_seconds: float) -> None:
    simulation = Simulation(CONFIG)
    share = share_of_forward(simulation, piece_seconds, lambda: simulation.generate(20, 200))
    assert share == pytest.approx(SHARE_BESIDE / (1 + SHARE_BESIDE), rel=0.15)


def test_a_forward_of_its_own_has_a_share_of_the_time_next_to_the_encoding_of_media() -> None:
    """A request with a new image would otherwise wait for a whole round after each step that encodes it."""
    simulation = Simulation(CONFIG)
    share = share_of_forward(simulation, 0.01, lambda: simulation.generate(20, 1, num_images=1, num_frames=64))
    assert share == pytest.approx(SHARE_BESIDE / (1 + SHARE_BESIDE), rel=0.15)


def share_of_forward(simulation: Simulation, piece_seconds: float, generate: Callable[[], str]) -> float:
    """Return the share of the time that a forward has until a request ends."""
    forward = EndlessForward(simulation, piece_seconds)
    simulation.engine._side_work.add(forward, "")
    request = generate()
    simulation.step()
    began, before = simulation.now, forward.seconds
    simulation.run(request)
    return (forward.seconds - before) / (simulation.now - began)


def test_a_forward_of_its_own_has_whole_rounds_when_nothing_else_runs() -> None:
    simulation = Simulation(CONFIG)
    forward = EndlessForward(simulation, 0.001)
    simulation.engine._side_work.add(forward, "")
    simulation.step()
    assert forward.seconds == pytest.approx(0.001 * 2 * CONFIG.max_tokens_per_step / ROUNDS_PER_STEP)


@pytest.mark.parametrize("step_seconds", [0.03, 0.05])
@pytest.mark.parametrize("frame", [0.018, 0.05])
def test_frames_for_vectors_take_their_share_of_the_time_beside_small_requests(
    frame: float, step_seconds: float
) -> None:
    """A frame may take longer than such a step: then not each step has one."""
    costs = Costs(frame=frame)
    simulation = Simulation(replace(CONFIG, step_seconds=step_seconds), costs)
    alone = mean(simulation.arrive(simulation.now + 0.5) for _ in range(3))
    simulation.embed(1000)
    began = len(simulation.runner.plans)
    times = [simulation.arrive(simulation.now + 0.1) for _ in range(20)]
    assert sorted(times)[18] <= 2.2 * alone + frame
    shared_steps = [plan for plan in simulation.runner.plans[began:] if plan.rows]
    share = sum(plan.num_frames for plan in shared_steps) * frame / sum(map(costs.of, shared_steps))
    assert 0.1 < share < SHARE_BESIDE / (1 + SHARE_BESIDE) + 0.05


def run_beside_new_images(simulation: Simulation, seconds: float, num_open: int = 4) -> list[float]:
    """Keep this many small requests open, each with a new image, and return how long those that ended took."""
    names = [simulation.generate(20, 4, num_images=1, client=str(i)) for i in range(num_open)]
    times: list[float] = []
    end = simulation.now + seconds
    while simulation.now < end:
        simulation.step()
        for i, name in enumerate(names):
            if name in simulation.ended:
                times.append(simulation.ended[name] - simulation.arrived[name])
                names[i] = simulation.generate(20, 4, num_images=1, client=str(i))
    return times


@pytest.mark.parametrize("max_frames", [1, 2, 16])
@pytest.mark.parametrize("frame", [0.004, 0.018, 0.05])
def test_vectors_of_images_do_not_wait_for_small_requests_with_images_to_cease(frame: float, max_frames: int) -> None:
    """Each step may encode the image of a small request, which takes longer than the share of the vectors."""
    config = replace(CONFIG, step_seconds=0.03, max_frames_per_step=max_frames, max_frames_idle=max_frames)
    simulation = Simulation(config, Costs(frame=frame))
    vectors, began, before = simulation.embed(5000, client="vectors"), simulation.now, len(simulation.runner.plans)
    times = run_beside_new_images(simulation, 10)
    assert vectors not in simulation.ended
    assert len(times) > 20
    plans = simulation.runner.plans[before:]
    of_vectors = sum(plan.frames_by_request[vectors] for plan in plans)
    share = of_vectors * frame / (simulation.now - began)
    assert share < SHARE_BESIDE / (1 + SHARE_BESIDE) + 0.05
    # a small limit of frames per step is shared with the requests
    assert share > 0.18 or of_vectors > 0.4 * sum(plan.num_frames for plan in plans)


@pytest.mark.parametrize("max_frames", [1, 2, 16])
def test_a_large_prompt_with_new_images_does_not_wait_for_small_requests_with_images_to_cease(max_frames: int) -> None:
    simulation = Simulation(replace(CONFIG, step_seconds=0.03, max_frames_per_step=max_frames))
    large = simulation.generate(300, 4, num_images=24, client="large")
    run_beside_new_images(simulation, 30, num_open=24)
    assert large in simulation.ended


def test_the_vectors_of_one_client_do_not_wait_for_those_of_another() -> None:
    simulation = Simulation(CONFIG)
    for _ in range(100):
        simulation.embed(16, client="crowd")
    simulation.embed(1, client="crowd", num_frames=64)
    simulation.run_until(simulation.now + 5)
    assert simulation.run(simulation.embed(1, client="other")) < 0.3
    for _ in range(3):
        simulation.generate(20, 2000, client="crowd")
    simulation.run_until(simulation.now + 1)
    assert simulation.run(simulation.embed(1, client="another")) < 0.6


def test_a_long_video_does_not_keep_its_turn_until_its_vector_is_complete() -> None:
    simulation = Simulation(CONFIG)
    video = simulation.embed(1, num_frames=256)
    simulation.run_until(simulation.now + 1)
    assert simulation.run(simulation.embed(4)) < 0.5
    assert video not in simulation.ended


def test_the_forwards_of_one_client_do_not_wait_for_those_of_another() -> None:
    """Each round of the crowd takes longer than the share of several steps, and each of the other a moment."""
    simulation = Simulation(CONFIG)
    crowd = [EndlessForward(simulation, 0.04, f"crowd {i}") for i in range(20)]
    for forward in crowd:
        simulation.engine._side_work.add(forward, "crowd")
    decoding = simulation.generate(20, 2000)
    simulation.run_until(simulation.now + 2)
    other = EndlessForward(simulation, 0.002, "other")
    simulation.engine._side_work.add(other, "other")
    before = sum(forward.seconds for forward in crowd)
    simulation.run_until(simulation.now + 5)
    assert decoding not in simulation.ended
    assert other.seconds > 0.5 * (sum(forward.seconds for forward in crowd) - before)


def test_forwards_that_end_in_one_round_count_as_work_of_their_client() -> None:
    """A client that sends one small forward after the other has no more time than a client with a long one."""

    class Short(EndlessForward):
        def pieces(self) -> Generator[float, None, Iterable[Outbound]]:
            self.simulation.runner.now += self.piece_seconds
            self.seconds += self.piece_seconds
            yield from ()
            return []

    simulation = Simulation(CONFIG)
    long = EndlessForward(simulation, 0.01, "long")
    simulation.engine._side_work.add(long, "long")
    simulation.generate(20, 6000)
    # the other client arrives with the whole credit of an idle one
    simulation.run_until(simulation.now + 10)
    assert long.seconds > 1.5 * CREDIT
    before, end = long.seconds, simulation.now + 30
    shorts: list[Short] = []
    while simulation.now < end:
        if not shorts or shorts[-1].is_finished:
            shorts.append(Short(simulation, 0.01, f"short {len(shorts)}"))
            simulation.engine._side_work.add(shorts[-1], "shorts")
        simulation.step()
    assert long.seconds - before > 0.6 * sum(short.seconds for short in shorts) > 0


def test_a_first_forward_that_compiles_kernels_does_not_keep_others_waiting() -> None:
    simulation = Simulation(CONFIG)
    simulation.generate(20, 4000)
    simulation.step()
    simulation.step()
    forward = EndlessForward(simulation, 20.0)
    simulation.engine._side_work.add(forward, "")
    while not forward.seconds:
        simulation.step()
    simulation.engine._side_work.remove("forward")
    other = EndlessForward(simulation, 0.001, "other")
    simulation.engine._side_work.add(other, "")
    began = simulation.now
    while not other.seconds:
        simulation.step()
    assert simulation.now - began < 1.2 * MAX_DEBT / SHARE_BESIDE


@pytest.mark.parametrize("piece_seconds", [0.0005, 0.02])
def test_forwards_and_vectors_share_the_time_of_side_work(piece_seconds: float) -> None:
    simulation = Simulation(CONFIG)
    forward = EndlessForward(simulation, piece_seconds)
    simulation.engine._side_work.add(forward, "")
    vectors, decoding = simulation.embed(4000), simulation.generate(20, 400)
    simulation.step()
    began, before, start = simulation.now, forward.seconds, len(simulation.runner.plans)
    simulation.run(decoding)
    total = simulation.now - began
    of_vectors = (
        sum(plan.frames_by_request[vectors] for plan in simulation.runner.plans[start:]) * Costs().frame / total
    )
    of_forwards = (forward.seconds - before) / total
    assert of_vectors + of_forwards == pytest.approx(SHARE_BESIDE / (1 + SHARE_BESIDE), rel=0.15)
    assert of_vectors == pytest.approx(of_forwards, rel=0.3)


def test_small_requests_that_come_again_and_again_do_not_each_meet_a_round_of_a_forward() -> None:
    """Between them the forward has all the time. Each may arrive during a round, which ends first."""
    simulation = Simulation(replace(CONFIG, step_seconds=0.03))
    alone = mean(simulation.arrive(simulation.now + 0.1) for _ in range(3))
    forward = EndlessForward(simulation, 0.05, tokens=inf)
    simulation.engine._side_work.add(forward, "forward")
    simulation.run_until(simulation.now + 1)
    began, before = simulation.now, forward.seconds
    times = [simulation.arrive(simulation.now + 0.1) for _ in range(40)]
    met = (sum(times) - len(times) * alone) / 0.05
    assert met / len(times) < 1.0
    assert (forward.seconds - before) / (simulation.now - began) > 0.4
