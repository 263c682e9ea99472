"""Requests that share shots which attend alone, in simulated time: each is computed once, and sharing delays no request."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import pytest

from model.prompt import EncodedPrompt
from server.engine import sequence as sequences
from server.engine.plan import Plan
from server.wire import BACKGROUND_PRIORITY, Generate, Sampling
from tests.engine_client import IMAGE_TOKEN, assert_all_released
from tests.engine_simulation import Simulation
from tests.server.engine.test_scheduler import CONFIG

PREFIX = [7, 7, 7]
LENGTH, LONGER_THAN_A_STEP = 9, 150
ONCE = Sampling(max_tokens=2, temperature=0.0, ignore_eos=True)


def digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def ask(simulation: Simulation, shots: Sequence[int], priority: int = 0, length: int = LENGTH) -> str:
    """Add a request with these shots and a query of its own, of `length` tokens each."""
    name = simulation._name()
    media = [*(f"shot {shot}" for shot in shots), f"query {name}"]
    digests = list(map(digest_of, media))
    simulation.num_frames.update(dict.fromkeys(digests, 1))
    token_ids, media_index = list(PREFIX), [-1] * len(PREFIX)
    for index, text in enumerate(media):
        token_ids += [IMAGE_TOKEN, *text.encode()[: length - 1].ljust(length - 1, b".")]
        media_index += [index] * length
    prompt = EncodedPrompt(token_ids=token_ids, media_index=media_index, media=digests, shots_attend="alone")
    return simulation.add(Generate(request_id=name, prompt=prompt, sampling=ONCE, priority=priority))


def num_computed(simulation: Simulation) -> int:
    """Return how many tokens of prefixes and shots were computed."""
    rows = [row for plan in simulation.runner.plans for row in plan.rows if row.sequence.layout is not None]
    starts = [(row, row.sequence.layout.query_start) for row in rows if row.sequence.layout is not None]
    return sum(min(row.start + row.count, start) - min(row.start, start) for row, start in starts)


def latencies(simulation: Simulation, selections: Sequence[Sequence[int]], length: int) -> list[float]:
    """Let requests arrive at random moments; return the seconds of each."""
    moments, names = random.Random(1), []
    for shots in selections:
        simulation.run_until(simulation.now + 0.05 * moments.random())
        names.append(ask(simulation, shots, length=length))
    for name in names:
        simulation.run(name)
    assert_all_released(simulation.engine)
    return [simulation.ended[name] - simulation.arrived[name] for name in names]


@pytest.mark.parametrize(
    ("length", "num_shots", "num_requests"), [(LENGTH, 60, 120), (LONGER_THAN_A_STEP, 12, 16)], ids=["short", "long"]
)
def test_each_shot_is_computed_once_and_sharing_delays_no_request(
    length: int, num_shots: int, num_requests: int
) -> None:
    draw = random.Random(0)
    selections = [draw.sample(range(num_shots), 8) for _ in range(num_requests)]
    simulation = Simulation(CONFIG)
    shared = latencies(simulation, selections, length)
    used = {shot for shots in selections for shot in shots}
    assert num_computed(simulation) == len(PREFIX) + length * len(used)
    unshared = [[1000 * i + shot for shot in shots] for i, shots in enumerate(selections)]
    apart = latencies(Simulation(CONFIG), unshared, length)
    assert mean(shared) < mean(apart)
    assert max(shared) < max(apart)


@pytest.mark.parametrize("num_shots", [1, 8])
def test_warming_delays_requests_that_need_its_shots_little(num_shots: int) -> None:
    """A request waits for a shot that work in the background computes, in a step of its own at most."""
    simulation = Simulation(CONFIG)
    alone = mean(simulation.run(ask(simulation, range(100 * i, 100 * i + num_shots))) for i in range(3))
    seconds = []
    for i in range(5, 15):
        for shot in range(100 * i, 100 * i + num_shots):
            ask(simulation, [shot], BACKGROUND_PRIORITY)
        simulation.step()
        seconds.append(simulation.run(ask(simulation, range(100 * i, 100 * i + num_shots))))
    assert mean(seconds) <= 3 * alone


def test_a_small_request_does_not_wait_for_the_last_shots_of_a_large_one() -> None:
    """It computes them itself, and the large one does not compute them again."""
    simulation = Simulation(CONFIG)
    alone = mean(simulation.run(ask(simulation, [1000 + i])) for i in range(3))
    before, num_shots = num_computed(simulation), 400
    large = ask(simulation, range(num_shots))
    for _ in range(3):
        simulation.step()
    seconds = [simulation.run(ask(simulation, [num_shots - 1 - i])) for i in range(6)]
    assert max(seconds) <= 3 * alone
    assert large not in simulation.ended
    simulation.run(large)
    assert num_computed(simulation) - before == LENGTH * num_shots
    assert_all_released(simulation.engine)


def test_a_request_does_not_wait_for_a_shot_that_one_of_a_lower_priority_computes() -> None:
    """It computes its last shot itself, although another one has begun with that, and rarely goes on."""
    simulation, shots = Simulation(CONFIG), range(5)
    urgent, first = ask(simulation, shots, length=LONGER_THAN_A_STEP), len(simulation.runner.plans)
    while not (running := simulation.engine.scheduler.running):
        simulation.step()
    (sequence,) = running
    assert sequence.spans is not None
    last = sequence.spans.shots[sequence.order_of_shots[-1]].source
    (shot,) = (shot for shot in shots if digest_of(f"shot {shot}") == last)
    background = ask(simulation, [shot], BACKGROUND_PRIORITY, LONGER_THAN_A_STEP)
    simulation.run(urgent)
    rows = [row for plan in simulation.runner.plans[first:] for row in plan.rows]
    assert {row.sequence.request_id for row in rows} == {urgent, background}
    assert sum(row.count for row in rows if row.sequence is sequence) == len(sequence.token_ids) - 1
    simulation.run(background)
    assert_all_released(simulation.engine)


@pytest.mark.parametrize("priorities", [(0, BACKGROUND_PRIORITY), (BACKGROUND_PRIORITY, 0)])
def test_of_several_sequences_that_compute_a_block_the_most_urgent_one_counts(priorities: tuple[int, int]) -> None:
    """Otherwise a request would compute a block again, because one in the background computes it as well."""
    simulation = Simulation(CONFIG)
    plan = Plan(step=1, tokens_left=0, max_frames=0, max_frames_idle=0)
    for shot, priority in enumerate(priorities):
        ask(simulation, [shot], priority)
    for sequence in simulation.engine.scheduler.waiting:
        plan.note_progress(sequence, [b"block"])
    assert plan.in_progress == {b"block": 0}


def waiting_for_pages(simulation: Simulation, shots: Sequence[int]) -> sequences.Sequence:
    """Return the sequence of a new request that holds slots of pages, which are encoded next to the rows of another one."""
    simulation.generate(20, max_tokens=100)
    simulation.step()
    ask(simulation, shots)
    while not (holders := [sequence for sequence in simulation.engine.scheduler.running if sequence.media_slots]):
        simulation.step()
    (sequence,) = holders
    return sequence


def test_a_sequence_holds_no_page_of_a_shot_that_another_one_has_computed() -> None:
    """With the last slot, it would wait for ever for the page of its query."""
    simulation = Simulation(replace(CONFIG, num_media_slots=1, overlaps=True))
    sequence, blocks = waiting_for_pages(simulation, [1]), simulation.engine.blocks
    assert sequence.layout is not None
    indices = sequence.layout.blocks(1)
    computed = blocks.allocate(len(indices))
    assert computed is not None
    for block, index in zip(computed, indices, strict=True):
        blocks.publish(block, sequence.block_hash(index, CONFIG.block_size))
    blocks.release(computed)
    simulation.run(sequence.request_id, max_steps=50)


def test_a_sequence_holds_no_page_of_a_shot_that_it_leaves_to_another_one() -> None:
    simulation = Simulation(replace(CONFIG, overlaps=True))
    sequence, memory = waiting_for_pages(simulation, [1, 2]), simulation.engine.residents.memory
    (other,) = (running for running in simulation.engine.scheduler.running if running is not sequence)
    assert sequence.spans is not None
    first = sequence.spans.shots[sequence.order_of_shots[0]]
    assert first.key in sequence.media_slots
    memory.put_off(sequence, {first.hashes[-1]: other})
    assert first.key not in sequence.media_slots
