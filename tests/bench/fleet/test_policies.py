"""Tests that the simulated policy chooses as the deployment's function does, for the same order of preference."""

from __future__ import annotations

import numpy as np
import pytest

from bench.fleet.policies import Affinity, Deployed, hashes_of
from deploy.ray.affinity import preferred
from tests.bench.fleet.fleets import rng


@pytest.mark.parametrize("num_replicas", [1, 2, 5, 40])
def test_the_rule_is_that_of_the_deployment(num_replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Affinity(rng())
    policy.set_alive(range(num_replicas))
    monkeypatch.setattr("deploy.ray.affinity.ranked", lambda key, _: [str(r) for r in policy.order(int(key))])
    for support_set in range(100):
        loads = rng(support_set).integers(0, 6, num_replicas).tolist()
        expected = preferred(str(support_set), {str(r): load for r, load in enumerate(loads)})[0]
        assert policy.choose(support_set, loads) == int(expected)


def test_the_function_of_the_deployment_spreads_support_sets() -> None:
    policy = Deployed(rng())
    policy.set_alive([0, 1, 3])
    counts = np.bincount([policy.choose(support_set, [0] * 4) for support_set in range(600)], minlength=4)
    assert counts[2] == 0
    assert counts[[0, 1, 3]].min() > 150


def test_every_replica_is_preferred_by_its_share_of_the_sets() -> None:
    firsts = [int(np.argmin(hashes_of(support_set, np.arange(10)))) for support_set in range(5000)]
    assert np.bincount(firsts).min() > 430
    assert np.bincount(firsts).max() < 570
