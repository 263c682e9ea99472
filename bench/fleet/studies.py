"""The studies of docs/scale.md, each a function from the setup to rows of one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import numpy as np

from bench.fleet.failures import study_failures
from bench.fleet.fleet import Scenario
from bench.fleet.policies import Affinity
from bench.fleet.popularity import Floats, che_hit_rate, zipf
from bench.fleet.setup import (
    CACHED_SETS,
    POLICIES,
    SHAPE,
    Setup,
    sample,
    summary,
    warm_seconds,
    with_sets,
)
from bench.table import Row

Study = Callable[[Setup], Iterator[Row]]

MAX_REPLICAS = 400
# the bounds need loads of many requests per replica: long answers, decoded in batches
LONG_ANSWERS = replace(SHAPE, new_tokens=64)


def study_replicas(setup: Setup) -> Iterator[Row]:
    """Vary the number of replicas; load and support sets grow with it."""
    for num_replicas in (1, 4) if setup.is_quick else (1, 3, 10, 30, 100, 300, 1000):
        scenario = setup.scenario(num_replicas, 40 if setup.is_quick else _per_replica(num_replicas))
        for name, policy in POLICIES.items():
            yield {"replicas": num_replicas, "policy": name, **summary(setup.simulate(scenario, policy))}


def _per_replica(num_replicas: int) -> int:
    """Return how many requests per replica are enough for the percentiles of a fleet, and not too many to simulate."""
    return max(60, min(4000, 10_000 // num_replicas))


def study_caches(setup: Setup) -> Iterator[Row]:
    """Vary the sizes of the caches of four replicas, and compare the hit rates with Che's approximation."""
    fleet = setup.scenario(4, 60 if setup.is_quick else 2000)
    for cached_sets in (20, 50) if setup.is_quick else (5, 10, 25, 50, 100, 200):
        scenario = replace(with_sets(fleet, cached_sets), warm_up=20 * cached_sets + 200)
        row: dict[str, Any] = {"sets cached": cached_sets}
        for name in ("affinity", "random"):
            hits = sample(setup.simulate(scenario, POLICIES[name]), lambda outcome: outcome.text_hit_rate)
            row |= {
                name: hits.median,
                f"Che, {name}": expected_hit_rate(scenario, name),
                f"range, {name}": hits.spread(),
            }
        yield row


def expected_hit_rate(scenario: Scenario, policy: str) -> float:
    """Return Che's hit rate of the text caches, if every set goes to the first replica of its order, or to any."""
    popularity, shape = zipf(scenario.num_sets, scenario.exponent), scenario.shape
    hit_rate = partial(
        che_hit_rate,
        capacity=scenario.sizes.tokens,
        size=shape.set_tokens,
        new_size=shape.query_tokens + shape.new_tokens,
    )
    if policy != "affinity":
        return float(hit_rate(popularity))
    shares = list(_shares(popularity, scenario.num_replicas))
    return float(sum(share.sum() * hit_rate(share / share.sum()) for share in shares))


def _shares(popularity: Floats, num_replicas: int) -> Iterator[Floats]:
    """Yield the popularities of the sets that prefer each replica."""
    policy = Affinity(np.random.default_rng(0))
    policy.set_alive(range(num_replicas))
    firsts = np.array([policy.order(support_set)[0] for support_set in range(len(popularity))])
    for replica in range(num_replicas):
        yield popularity[firsts == replica]


def study_bounds(setup: Setup) -> Iterator[Row]:
    """Vary the bound of the load, with a few support sets that are much more popular than the others."""
    scenario = setup.scenario(8 if setup.is_quick else 50, 30 if setup.is_quick else 200, LONG_ANSWERS)
    for exponent in (1.0, 1.3):
        hot = replace(scenario, exponent=exponent)
        for factor in (1.05, 1.25, 2.0, 4.0, inf):
            policy = partial(Affinity, factor=factor, num_free=0)
            outcomes = setup.simulate(hot, policy)
            share = float(zipf(hot.num_sets, exponent)[0])
            yield {"first set": f"{share:.0%}", "factor": str(factor), **summary(outcomes)}


def study_costs(setup: Setup) -> Iterator[Row]:
    """Find the smallest fleet for a fixed load that has its 95th percentile within the target, and its cost."""
    rate = (4 if setup.is_quick else 40) * setup.rate
    num_sets = (4 if setup.is_quick else 40) * CACHED_SETS
    base = setup.scenario(1, 600 if setup.is_quick else 6000)
    fewest = max(round(rate * warm_seconds(setup.costs, SHAPE)), 1)  # they are busy with warm requests alone
    load = replace(base, rate=rate, num_sets=num_sets)
    for name, policy in POLICIES.items():

        def outcomes(num_replicas: int, policy: Any = policy) -> list[Any]:
            return setup.simulate(replace(load, num_replicas=num_replicas), policy)

        def is_enough(num_replicas: int) -> bool:
            tail = sample(outcomes(num_replicas), lambda outcome: outcome.percentile(95))
            return max(tail.values) <= setup.target

        smallest = smallest_that(is_enough, fewest, MAX_REPLICAS)
        row: dict[str, Any] = {"policy": name, "requests/s": rate, "replicas": smallest}
        if smallest is not None:
            row["per million requests"] = cost_per_million(smallest, setup.price, rate)
            row |= summary(outcomes(smallest))
        yield row


def cost_per_million(num_replicas: int, price: float, rate: float) -> float:
    """Return the price of a million requests, at a price per replica and hour."""
    return num_replicas * price / 3600 / rate * 1e6


def smallest_that(holds: Callable[[int], bool], low: int, most: int) -> int | None:
    """Return the smallest number from `low` on that is enough, if all larger ones are as well; None if `most` is not."""
    high = low
    while not holds(high):
        if high == most:
            return None
        low, high = high + 1, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


STUDIES: Mapping[str, Study] = {
    "replicas": study_replicas,
    "caches": study_caches,
    "bounds": study_bounds,
    "failures": study_failures,
    "costs": study_costs,
}
