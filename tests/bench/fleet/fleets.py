"""Costs and scenarios of small fleets, for the tests."""

from __future__ import annotations

import numpy as np

from bench.fleet.caches import CacheSizes, Shape
from bench.fleet.costs import Costs
from bench.fleet.fleet import Scenario

# round numbers, not measured ones
COSTS = Costs(
    decode=((1, 0.005), (8, 0.012)),
    prompt=((1, 0.006), (16, 0.012), (256, 0.09)),
    images=((1, 0.02), (2, 0.04)),
    page=0.002,
    request=0.008,
    transfer=0.002,
    ray_request=0.016,
    ray_idle_cores=0.1,
    is_measured=False,
)
SHAPE = Shape(shots=8, shot_tokens=10, query_tokens=4, new_tokens=8)
SIZES = CacheSizes(pages=340, host=0, tokens=6000)
SMALL = Scenario(
    num_replicas=4,
    num_requests=2000,
    num_sets=400,
    exponent=1.0,
    shape=SHAPE,
    sizes=SIZES,
    rate=10.0,
    warm_up=300,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)
