"""A simulated fleet: requests arrive, a policy routes each, and a replica may die and return with cold caches."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from simpy import Environment, Event

from bench.fleet.caches import Caches, CacheSizes, Shape
from bench.fleet.costs import Costs
from bench.fleet.policies import MakePolicy, Policy
from bench.fleet.popularity import Floats, draw, zipf
from bench.fleet.processors import PrivateProcessors, Processors, SharedProcessors
from bench.fleet.replica import Replica, Request
from bench.ray_workload import STEP_TIME_TARGET


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A replica that dies at a time; it is back, with empty caches, after `absent` seconds."""

    replica: int
    at: float
    absent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A fleet and the requests that it gets.

    Requests arrive at random with `rate` per second (a Poisson process). With a `rate` of 0, each of `clients` sends its
    next request when its last one has ended. Before that, the caches see `warm_up` requests per replica in zero time. With
    `shared_cores` all replicas run on this number of cores, else each has its own machine.
    """

    num_replicas: int
    num_requests: int
    num_sets: int
    exponent: float
    shape: Shape
    sizes: CacheSizes
    rate: float = 0.0
    clients: int = 0
    warm_up: int = 0
    step_seconds: float = STEP_TIME_TARGET
    shared_cores: float | None = None
    failure: Failure | None = None
    in_jumps: bool = True


@dataclass(frozen=True)
class Outcome:
    """The requests of a simulation, in the order of their arrival, and the utilisation of each replica."""

    requests: tuple[Request, ...]
    shape: Shape
    utilisation: Floats

    @cached_property
    def arrived(self) -> Floats:
        return np.array([request.arrived for request in self.requests])

    @cached_property
    def first_token(self) -> Floats:
        """Seconds from arrival to the first token."""
        return np.array([request.first_token - request.arrived for request in self.requests])

    @cached_property
    def absent(self) -> Floats:
        """Images of the support set that were in no cache, needed or not."""
        return np.array([request.misses.absent if request.misses else 0 for request in self.requests], dtype=float)

    @cached_property
    def encoded(self) -> Floats:
        """Images of the support set that had to be encoded."""
        return np.array([request.misses.encoded if request.misses else 0 for request in self.requests], dtype=float)

    @cached_property
    def tokens(self) -> Floats:
        """Tokens of the support set that had to be computed."""
        return np.array([request.misses.tokens if request.misses else 0 for request in self.requests], dtype=float)

    @property
    def page_hit_rate(self) -> float:
        """The share of the shots' images that did not have to be encoded."""
        return 1 - float(self.encoded.mean()) / self.shape.shots

    @property
    def present_rate(self) -> float:
        """The share of the shots' images that were in a cache, needed or not, as the server's usage reports it."""
        return 1 - float(self.absent.mean()) / self.shape.shots

    @property
    def text_hit_rate(self) -> float:
        """The share of the shots' tokens that were cached."""
        return 1 - float(self.tokens.mean()) / self.shape.set_tokens

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.first_token, percent))

    def between(self, begin: float, end: float) -> Outcome:
        """Return the part of the requests that arrived in a period."""
        chosen = np.flatnonzero((self.arrived >= begin) & (self.arrived < end))
        return Outcome(tuple(self.requests[i] for i in chosen), self.shape, self.utilisation)

    def after_share(self, share: float) -> Outcome:
        """Return the requests after the first share of them, when the queues have filled."""
        return Outcome(self.requests[int(share * len(self.requests)) :], self.shape, self.utilisation)


def simulate(
    scenario: Scenario, costs: Costs, make_policy: MakePolicy, seed: int, support_sets: list[int] | None = None
) -> Outcome:
    """Run a scenario until its last request has ended. Equal arguments give equal results.

    The requests show these support sets, or else sets that are drawn by their popularity.
    """
    rngs = [np.random.default_rng([seed, purpose]) for purpose in range(3)]
    fleet = Fleet(scenario, costs, make_policy(rngs[0]))
    probabilities = zipf(scenario.num_sets, scenario.exponent)
    fleet.warm_up(draw(probabilities, scenario.warm_up * scenario.num_replicas, rngs[1]).tolist())
    if support_sets is None:
        support_sets = draw(probabilities, scenario.num_requests, rngs[1]).tolist()
    return fleet.run(support_sets, rngs[2])


class Fleet:
    """Replicas, the policy that routes to them, and the requests in flight."""

    def __init__(self, scenario: Scenario, costs: Costs, policy: Policy) -> None:
        self._scenario = scenario
        self._costs = costs
        self._policy = policy
        self._environment = Environment()
        self._processors = self._make_processors()
        self._loads = [0] * scenario.num_replicas
        self._alive = [True] * scenario.num_replicas
        self._replicas = [self._make_replica() for _ in range(scenario.num_replicas)]
        self._requests: list[Request] = []
        self._num_unfinished = scenario.num_requests
        self._client_events: dict[int, Event] = {}
        self._done = self._environment.event()
        policy.set_alive(range(scenario.num_replicas))

    def warm_up(self, support_sets: list[int]) -> None:
        """Let the caches see requests that take no time, routed as if the fleet were idle."""
        for number, support_set in enumerate(support_sets, start=self._scenario.num_requests):
            replica = self._policy.choose(support_set, self._loads)
            self._replicas[replica].caches.use(support_set, number)

    def run(self, support_sets: list[int], rng: np.random.Generator) -> Outcome:
        for replica in self._replicas:
            replica.start()
        if self._scenario.rate:
            gaps = rng.exponential(1 / self._scenario.rate, len(support_sets)).tolist()
            self._environment.process(self._arrivals(support_sets, gaps))
        else:
            pending = iter(enumerate(support_sets))
            for _ in range(self._scenario.clients):
                self._environment.process(self._client(pending))
        if self._scenario.failure is not None:
            self._environment.process(self._fail(self._scenario.failure))
        self._environment.run(until=self._done)
        busy = np.array([replica.busy for replica in self._replicas])
        return Outcome(tuple(self._requests), self._scenario.shape, busy / max(self._environment.now, 1e-12))

    def _make_processors(self) -> Processors:
        if self._scenario.shared_cores is None:
            return PrivateProcessors(self._environment)
        return SharedProcessors(self._environment, self._scenario.shared_cores)

    def _make_replica(self) -> Replica:
        scenario = self._scenario
        return Replica(
            self._environment,
            self._costs,
            Caches(scenario.sizes, scenario.shape),
            self._processors,
            self._finish,
            scenario.step_seconds,
            in_jumps=scenario.in_jumps and scenario.shared_cores is None,
        )

    def _arrivals(self, support_sets: list[int], gaps: list[float]) -> Generator[Event, Any, None]:
        for number, (support_set, gap) in enumerate(zip(support_sets, gaps, strict=True)):
            yield self._environment.timeout(gap)
            self._receive(number, support_set)

    def _client(self, pending: Iterator[tuple[int, int]]) -> Generator[Event, Any, None]:
        for number, support_set in pending:
            ended = self._client_events[number] = self._environment.event()
            self._receive(number, support_set)
            yield ended

    def _receive(self, number: int, support_set: int) -> None:
        request = Request(number, support_set, self._environment.now)
        self._requests.append(request)
        self._route(request)

    def _route(self, request: Request) -> None:
        request.replica = self._policy.choose(request.support_set, self._loads)
        self._loads[request.replica] += 1
        read: Any = self._processors.compute(self._costs.request)
        read.callbacks.append(partial(self._submit, request, request.replica))

    def _submit(self, request: Request, replica: int, _: Event) -> None:
        if self._alive[replica]:
            self._replicas[replica].submit(request)
        else:
            self._retry(request)

    def _finish(self, request: Request) -> None:
        self._loads[request.replica] -= 1
        self._num_unfinished -= 1
        if (ended := self._client_events.pop(request.number, None)) is not None:
            ended.succeed()
        if not self._num_unfinished:
            self._done.succeed()

    def _fail(self, failure: Failure) -> Generator[Event, Any, None]:
        yield self._environment.timeout(failure.at)
        self._alive[failure.replica] = False
        lost = self._replicas[failure.replica].stop()
        self._note_alive()
        for request in lost:
            self._retry(request)
        yield self._environment.timeout(failure.absent)
        self._alive[failure.replica] = True
        self._note_alive()
        self._replicas[failure.replica].start()

    def _retry(self, request: Request) -> None:
        """Route a request again after its replica was lost; a token that was already sent does not count."""
        self._loads[request.replica] -= 1
        request.num_retries += 1
        request.first_token = -1.0
        request.waits_for = None
        self._route(request)

    def _note_alive(self) -> None:
        self._policy.set_alive([number for number, is_alive in enumerate(self._alive) if is_alive])
