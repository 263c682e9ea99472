"""The workload of `bench.ray`: support sets whose popularity follows Zipf's law, and replicas that cache some of them.

Everything is drawn from seeds, so that a simulation can draw the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# how the gateway chooses a replica: as `routing` in the file of a fleet
Policy = Literal["affinity", "round_robin", "random"]
POLICIES: tuple[Policy, ...] = ("affinity", "round_robin", "random")

# of the default model with the template `caption`: 78 tokens for 8 shots and a query
TOKENS_PER_SHOT = 9
QUERY_TOKENS = 8
# the servers of all runs, as the simulator describes them
STEP_TIME_TARGET = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of clients in closed loops. Each shows all shots of one support set, and its own query image.

    Each turn of a policy has its own support sets, so it begins with caches that hold nothing useful. Its first
    `num_warmup` requests are not measured.
    """

    num_sets: int = 200
    num_shots: int = 8  # examples of a set, each with one image
    exponent: float = 1.0  # the set of rank r has a share of requests that is proportional to r ** -exponent
    num_warmup: int = 400
    num_requests: int = 800  # measured, per turn
    num_clients: int = 4  # each sends its next request when the first token of its last one has arrived
    max_tokens: int = 1
    cached_sets: int = 50  # support sets that the caches of one replica hold, pages and prompts alike
    # MiB of visual tokens in host memory, from which pages are computed again without the encoder: none, as if there were
    # many more sets than any cache holds
    host_media_mb: int = 0
    seed: int = 0

    @property
    def cache_tokens(self) -> int:
        """Tokens of one replica's text cache: the prompts of the cached sets, each with a query, and those that run."""
        prompt = self.num_shots * TOKENS_PER_SHOT + QUERY_TOKENS
        return (self.cached_sets + self.num_clients) * prompt

    @property
    def cache_pages(self) -> int:
        """Media pages of one replica: those of the cached sets, and of the queries that run."""
        return self.cached_sets * self.num_shots + self.num_clients

    def draws(self, turn: int) -> Sequence[int]:
        """Return the set of each request of a turn, as its rank from 0 on; warm-up included."""
        weights = [(rank + 1) ** -self.exponent for rank in range(self.num_sets)]
        number = self.num_warmup + self.num_requests
        return random.Random(f"{self.seed} {turn}").choices(range(self.num_sets), weights, k=number)


QUICK = Workload(num_sets=6, num_shots=2, num_warmup=6, num_requests=12, num_clients=2, cached_sets=3)
