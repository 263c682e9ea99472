"""The costs of Ray are measured on a real fleet; `make test-deploy` runs this."""

from __future__ import annotations

import json

import pytest

from bench.fleet import measure_ray


def test_the_costs_of_a_request_through_ray_are_measured(capfd: pytest.CaptureFixture[str]) -> None:
    """A request through a gateway and a replica takes milliseconds of processor time; an idle fleet takes less than a core."""
    assert measure_ray.main(["--quick", "--replicas", "2"]) == 0
    costs = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert 1e-4 < costs["ray_request"] < 1.0
    assert 0 < costs["ray_idle_cores"] < 1.0
