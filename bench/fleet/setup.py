"""The setup that all studies share: the workload, the policies, and simulations with several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from bench.fleet.caches import CacheSizes, Shape
from bench.fleet.costs import Costs
from bench.fleet.fleet import Outcome, Scenario, simulate
from bench.fleet.policies import Affinity, MakePolicy, Modulo, Random, RoundRobin
from bench.table import Row, Sample

POLICIES: Mapping[str, MakePolicy] = {"affinity": Affinity, "round robin": RoundRobin, "random": Random}
HASHES: Mapping[str, MakePolicy] = {"rendezvous hashing": partial(Affinity, factor=inf), "modulo": Modulo}
# tokens of the template "caption" with texts of 24 characters, and of the rest that a cached prompt computes
SHAPE = Shape(shots=8, shot_tokens=9, query_tokens=6, new_tokens=16)
# the support sets that the caches of a replica hold, as those of bench.ray
CACHED_SETS = 50
SETS_PER_REPLICA = 50
EXPONENT = 1.0
# the share of the requests at the beginning of which the queues fill
UNSETTLED = 0.25
PERCENTILES = (50, 95, 99)
Measure = Callable[[Outcome], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The options of all studies. `load` is the utilisation of a replica if all of its requests were cold."""

    costs: Costs
    seeds: Sequence[int]
    load: float
    price: float
    target: float
    is_quick: bool

    @property
    def rate(self) -> float:
        """Requests per second and replica."""
        return self.load / cold_seconds(self.costs, SHAPE)

    def scenario(self, num_replicas: int, per_replica: int, shape: Shape = SHAPE) -> Scenario:
        """Return a fleet whose load and whose support sets are proportional to its size."""
        return Scenario(
            num_replicas=num_replicas,
            num_requests=num_replicas * per_replica,
            num_sets=num_replicas * SETS_PER_REPLICA,
            exponent=EXPONENT,
            shape=shape,
            sizes=sizes_for(CACHED_SETS, shape),
            rate=num_replicas * self.load / cold_seconds(self.costs, shape),
            warm_up=50 if self.is_quick else 600,
        )

    def simulate(self, scenario: Scenario, make_policy: MakePolicy) -> list[Outcome]:
        """Run a scenario with each seed, and return the requests after the queues have filled."""
        outcomes = (simulate(scenario, self.costs, make_policy, seed) for seed in self.seeds)
        return [outcome.after_share(UNSETTLED) for outcome in outcomes]


def sizes_for(num_sets: int, shape: Shape) -> CacheSizes:
    """Return caches for `num_sets` support sets and the queries of four requests; no visual tokens in host memory."""
    return CacheSizes(
        pages=num_sets * shape.shots + 4, host=0, tokens=num_sets * shape.set_tokens + 4 * shape.query_tokens
    )


def cold_seconds(costs: Costs, shape: Shape) -> float:
    """Return how long an engine that is alone with a cold request works on it."""
    prompt = costs.media(shape.shots + 1, 0) + costs.forward(0, shape.set_tokens + shape.query_tokens)
    return prompt + (shape.new_tokens - 1) * costs.forward(1, 0)


def warm_seconds(costs: Costs, shape: Shape) -> float:
    """Return how long an engine that is alone with a warm request works on it."""
    prompt = costs.media(1, 0) + costs.forward(0, shape.query_tokens)
    return prompt + (shape.new_tokens - 1) * costs.forward(1, 0)


def with_sets(scenario: Scenario, cached_sets: int) -> Scenario:
    """Return the scenario with caches that hold so many support sets."""
    return replace(scenario, sizes=sizes_for(cached_sets, scenario.shape))


def sample(outcomes: Sequence[Outcome], measure: Measure) -> Sample:
    return Sample(tuple(measure(outcome) for outcome in outcomes))


def summary(outcomes: Sequence[Outcome]) -> Row:
    """Return the medians over the seeds, and the range of the 95th percentile."""
    tail = sample(outcomes, lambda outcome: 1000 * outcome.percentile(95))
    return {
        "hit rate": sample(outcomes, lambda outcome: outcome.text_hit_rate).median,
        **{f"p{p} ms": sample(outcomes, partial(milliseconds, percent=p)).median for p in PERCENTILES},
        "range of p95": tail.spread(),
        "busy": sample(outcomes, lambda outcome: float(outcome.utilisation.mean())).median,
        "busiest": sample(outcomes, lambda outcome: float(outcome.utilisation.max())).median,
    }


def milliseconds(outcome: Outcome, percent: float) -> float:
    return 1000 * outcome.percentile(percent)
