"""The study of failures: a replica dies and returns cold, and the same requests are compared with those of a calm fleet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.fleet.fleet import Failure, Outcome, simulate
from bench.fleet.policies import MakePolicy
from bench.fleet.setup import HASHES, Setup
from bench.table import Row, Sample

NUM_REPLICAS = 20
ABSENT_SECONDS = 60.0
# a request is slowed down if it takes this many times as long as in the calm fleet
SLOWED = 1.5
# the fleet has recovered when the hit rate of a window differs by at most this from that of the calm fleet
CLOSE = 0.02
WINDOW_SECONDS = 10.0


@dataclass(frozen=True)
class Pair:
    """A calm fleet and one with a failure that get the same requests."""

    calm: Outcome
    failed: Outcome
    failure: Failure

    @property
    def end(self) -> float:
        return self.failure.at + self.failure.absent

    def slowed(self, begin: float, end: float) -> float:
        """Return the share of the requests of a period that took much longer because of the failure."""
        calm, failed = self.calm.between(begin, end).first_token, self.failed.between(begin, end).first_token
        return float(np.mean(failed > SLOWED * calm))

    def loss(self, begin: float, end: float) -> float:
        """Return by how much the hit rate of a period is lower because of the failure."""
        return self.calm.between(begin, end).text_hit_rate - self.failed.between(begin, end).text_hit_rate

    def recovery(self, since: float, until: float) -> float:
        """Return the seconds until the end of the last window whose hit rate is much lower than in the calm fleet."""
        begins = np.arange(since, until - WINDOW_SECONDS, WINDOW_SECONDS)
        late = [begin for begin in begins if self.loss(begin, begin + WINDOW_SECONDS) > CLOSE]
        return float(late[-1] + WINDOW_SECONDS - since) if late else 0.0


def study_failures(setup: Setup) -> Iterator[Row]:
    """Let a replica die and return with empty caches, and hash support sets in two ways."""
    for name, policy in HASHES.items():
        pairs = [_pair(setup, policy, seed) for seed in setup.seeds]
        yield {"hash": name, **_row(pairs)}


def _pair(setup: Setup, policy: MakePolicy, seed: int) -> Pair:
    num_replicas = 4 if setup.is_quick else NUM_REPLICAS
    seconds = 300.0 if setup.is_quick else 900.0
    failure = Failure(replica=1, at=seconds / 3, absent=ABSENT_SECONDS)
    calm = setup.scenario(num_replicas, round(seconds * setup.rate))
    return Pair(
        simulate(calm, setup.costs, policy, seed),
        simulate(replace(calm, failure=failure), setup.costs, policy, seed),
        failure,
    )


def _row(pairs: Sequence[Pair]) -> Row:
    def median(values: Iterator[float]) -> float:
        return Sample(tuple(values)).median

    recovery = Sample(tuple(pair.recovery(pair.end, pair.calm.arrived[-1]) for pair in pairs))
    return {
        "hit rate, calm": median(pair.calm.text_hit_rate for pair in pairs),
        "loss while absent": median(pair.loss(pair.failure.at, pair.end) for pair in pairs),
        "slowed": median(pair.slowed(pair.failure.at, pair.end) for pair in pairs),
        "loss in the minute after": median(pair.loss(pair.end, pair.end + 60) for pair in pairs),
        "slowed in it": median(pair.slowed(pair.end, pair.end + 60) for pair in pairs),
        "recovered after s": recovery.median,
        "range": recovery.spread(),
    }
