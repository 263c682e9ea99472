"""Tests of the simulated fleet: routing, batches, failures, and that simulating steps in jumps changes nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from bench.fleet.fleet import Failure, Outcome, simulate
from bench.fleet.policies import Affinity, Modulo, Policy, Random, RoundRobin
from bench.fleet.replica import Step
from tests.bench.fleet.fleets import COSTS, SHAPE, SIZES, SMALL, rng

POLICIES = [Affinity, Modulo, Random, RoundRobin]


def times(outcome: Outcome) -> list[tuple[float, float]]:
    return [(request.first_token, request.finished) for request in outcome.requests]


@pytest.mark.parametrize("rate", [4.0, 12.0, 18.0])
@pytest.mark.parametrize("new_tokens", [1, 8, 40])
def test_jumps_over_equal_steps_give_the_times_of_single_steps(rate: float, new_tokens: int) -> None:
    scenario = replace(SMALL, rate=rate, shape=replace(SHAPE, new_tokens=new_tokens), num_requests=800)
    jumps = simulate(scenario, COSTS, Affinity, 3)
    steps = simulate(replace(scenario, in_jumps=False), COSTS, Affinity, 3)
    np.testing.assert_allclose(times(jumps), times(steps), rtol=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_gives_the_same_times_again(policy: type[Policy]) -> None:
    first, second, other = (simulate(SMALL, COSTS, policy, seed) for seed in (0, 0, 1))
    assert times(first) == times(second) != times(other)


def test_all_policies_get_the_same_requests() -> None:
    requests = [
        [(request.support_set, request.arrived) for request in simulate(SMALL, COSTS, policy, 0).requests]
        for policy in POLICIES
    ]
    assert all(other == requests[0] for other in requests)


def test_enough_cores_are_like_a_machine_per_replica() -> None:
    alone = simulate(replace(SMALL, num_requests=500, in_jumps=False), COSTS, RoundRobin, 0)
    shared = simulate(replace(SMALL, num_requests=500, shared_cores=100), COSTS, RoundRobin, 0)
    np.testing.assert_allclose(times(alone), times(shared), rtol=1e-9)


def test_a_single_core_does_no_more_work_than_time_passes() -> None:
    outcome = simulate(replace(SMALL, num_requests=500, rate=50.0, shared_cores=1), COSTS, RoundRobin, 0)
    assert 0.85 < outcome.utilisation.sum() <= 1.0


def test_clients_have_one_request_each() -> None:
    outcome = simulate(replace(SMALL, rate=0.0, clients=3, num_requests=300), COSTS, Affinity, 0)
    for request in outcome.requests:
        running = [r for r in outcome.requests if r.arrived <= request.arrived < r.finished]
        assert len(running) <= 3
    assert len(outcome.requests) == 300


def test_a_warm_request_that_is_alone_takes_its_own_steps() -> None:
    scenario = replace(SMALL, num_replicas=1, num_sets=1, num_requests=50, rate=0.1, warm_up=5)
    outcome = simulate(scenario, COSTS, RoundRobin, 0)
    expected = COSTS.request + Step(0, images=1, tokens=4).seconds(COSTS)
    assert outcome.first_token == pytest.approx(expected)
    last = outcome.requests[-1]
    assert last.finished - last.first_token == pytest.approx(7 * COSTS.forward(1, 0))


def test_a_cold_support_set_is_encoded_and_computed() -> None:
    scenario = replace(SMALL, num_replicas=1, num_sets=1, num_requests=1, rate=0.1, warm_up=0, step_seconds=10.0)
    outcome = simulate(scenario, COSTS, RoundRobin, 0)
    seconds = COSTS.request + Step(0, images=9, tokens=84).seconds(COSTS)
    assert outcome.first_token == pytest.approx(seconds)
    assert (outcome.page_hit_rate, outcome.text_hit_rate) == (0.0, 0.0)


def test_requests_with_one_cold_support_set_compute_it_once() -> None:
    scenario = replace(SMALL, num_replicas=1, num_sets=1, num_requests=10, rate=1000.0, warm_up=0)
    outcome = simulate(scenario, COSTS, RoundRobin, 0)
    assert outcome.encoded.tolist() == [8] + 9 * [0]
    first, *rest = (request.first_token for request in outcome.requests)
    assert all(time > first for time in rest)


def test_affinity_has_more_hits_than_policies_without() -> None:
    affinity, random, turns = (simulate(SMALL, COSTS, policy, 0) for policy in (Affinity, Random, RoundRobin))
    assert affinity.page_hit_rate > random.page_hit_rate + 0.1
    assert affinity.page_hit_rate > turns.page_hit_rate + 0.1


def test_bounded_loads_spread_a_hot_support_set() -> None:
    hot = replace(SMALL, num_sets=1, rate=40.0, num_requests=1500)
    bounded, unbounded = (simulate(hot, COSTS, partial(Affinity, factor=factor), 0) for factor in (1.25, float("inf")))
    assert len({request.replica for request in unbounded.requests}) == 1
    assert len({request.replica for request in bounded.requests}) == 4
    assert bounded.percentile(95) < unbounded.percentile(95) / 2


def test_a_replica_that_leaves_moves_only_its_own_sets() -> None:
    moved = {}
    for policy in (Affinity(rng()), Modulo(rng())):
        policy.set_alive(range(10))
        before = [policy.choose(support_set, [0] * 10) for support_set in range(500)]
        policy.set_alive([number for number in range(10) if number != 3])
        after = [policy.choose(support_set, [0] * 10) for support_set in range(500)]
        assert 3 not in after
        pairs = list(zip(before, after, strict=True))
        moved[type(policy)] = sum(old not in (new, 3) for old, new in pairs)
    assert moved[Affinity] == 0
    assert moved[Modulo] > 300


def test_no_replica_has_more_than_its_bounded_load() -> None:
    policy, loads = Affinity(rng(), factor=1.25), [0] * 10
    policy.set_alive(range(10))
    for support_set in [0] * 300 + list(range(300)):
        loads[policy.choose(support_set, loads)] += 1
        assert max(loads) <= max(1.25 * sum(loads) / 10 + 1, 2)
    assert sum(loads) == 600


def test_a_failure_loses_no_request_and_returns_cold() -> None:
    calm = simulate(SMALL, COSTS, Affinity, 0)
    busy = next(request for request in calm.requests if request.arrived > 40 and request.replica == 1)
    failure = Failure(replica=1, at=busy.arrived + 0.02, absent=30.0)
    failed = simulate(replace(SMALL, failure=failure), COSTS, Affinity, 0)
    assert len(failed.requests) == len(calm.requests)
    assert all(request.finished >= request.first_token > request.arrived for request in failed.requests)
    begin, end = failure.at, failure.at + failure.absent
    absent = failed.between(begin, end)
    assert {request.replica for request in absent.requests} == {0, 2, 3}
    assert failed.requests[busy.number].num_retries == 1
    assert absent.page_hit_rate < calm.between(begin, end).page_hit_rate
    back = [request for request in failed.between(end, end + 60).requests if request.replica == 1]
    assert back[0].misses is not None
    assert back[0].misses.encoded == 8


def test_small_caches_miss_more() -> None:
    rates = [
        simulate(replace(SMALL, sizes=SIZES.scaled(factor)), COSTS, RoundRobin, 0).text_hit_rate
        for factor in (0.25, 1, 4)
    ]
    assert rates[0] < rates[1] < rates[2]
