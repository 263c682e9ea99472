"""The simulation agrees with results that others have proven: queues with Pollaczek and Khinchine, caches with Che."""

from __future__ import annotations

import pytest

from bench.fleet.caches import CacheSizes, PartialLru, Shape
from bench.fleet.costs import constant
from bench.fleet.fleet import Outcome, Scenario, simulate
from bench.fleet.policies import Random, RoundRobin
from bench.fleet.popularity import che_hit_rate, draw, zipf
from tests.bench.fleet.fleets import rng

ONE_IMAGE = Shape(shots=1, shot_tokens=1, query_tokens=1, new_tokens=1)
SECONDS = 0.1


def queue(rate: float, num_replicas: int = 1, seed: int = 1) -> Outcome:
    """Simulate requests that take an engine SECONDS each, one after the other."""
    scenario = Scenario(
        num_replicas=num_replicas,
        num_requests=60_000,
        num_sets=1,
        exponent=1.0,
        shape=ONE_IMAGE,
        sizes=CacheSizes(pages=10, host=10, tokens=100),
        rate=rate * num_replicas,
        warm_up=5,
        step_seconds=0.0,
    )
    return simulate(scenario, constant(SECONDS), Random, seed)


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_the_mean_time_in_a_queue_with_constant_service_is_that_of_m_d_1(utilisation: float) -> None:
    outcome = queue(utilisation / SECONDS)
    expected = SECONDS * (1 + utilisation / (2 * (1 - utilisation)))  # Pollaczek-Khinchine
    assert outcome.first_token.mean() == pytest.approx(expected, rel=0.03)
    assert outcome.utilisation[0] == pytest.approx(utilisation, rel=0.02)


def test_random_routing_gives_each_replica_its_own_m_d_1_queue() -> None:
    outcome = queue(0.6 / SECONDS, num_replicas=4)
    assert outcome.first_token.mean() == pytest.approx(SECONDS * (1 + 0.6 / 0.8), rel=0.03)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("capacity", [20, 100, 400])
def test_the_hit_rate_of_a_cache_is_that_of_ches_approximation(exponent: float, capacity: int) -> None:
    probabilities = zipf(1000, exponent)
    cache = PartialLru(capacity)
    misses = [cache.touch(entry, 1) for entry in draw(probabilities, 120_000, rng()).tolist()]
    hit_rate = 1 - sum(misses[20_000:]) / 100_000
    assert hit_rate == pytest.approx(che_hit_rate(probabilities, capacity), abs=0.005)


def test_ches_approximation_counts_what_is_never_used_again() -> None:
    probabilities = zipf(500, 1.0)
    cache, missing = PartialLru(2000), 0
    for number, entry in enumerate(draw(probabilities, 120_000, rng()).tolist()):
        num_missing = cache.touch(entry, 10)
        cache.touch(-1 - number, 4)
        missing += num_missing if number >= 20_000 else 0
    expected = che_hit_rate(probabilities, 2000, size=10, new_size=4)
    assert 1 - missing / 1_000_000 == pytest.approx(expected, abs=0.015)


def test_a_cache_that_holds_everything_hits_always() -> None:
    assert che_hit_rate(zipf(50, 1.0), 50) == pytest.approx(1.0)


def test_the_text_cache_of_a_fleet_has_the_hit_rate_of_ches_approximation() -> None:
    shape = Shape(shots=8, shot_tokens=10, query_tokens=4, new_tokens=4)
    scenario = Scenario(
        num_replicas=2,
        num_requests=40_000,
        num_sets=400,
        exponent=0.9,
        shape=shape,
        sizes=CacheSizes(pages=200, host=0, tokens=8000),
        rate=10.0,
        warm_up=4000,
    )
    outcome = simulate(scenario, constant(0.001), RoundRobin, 0)
    expected = che_hit_rate(zipf(400, 0.9), 8000, size=80, new_size=8)
    assert outcome.text_hit_rate == pytest.approx(expected, abs=0.015)
