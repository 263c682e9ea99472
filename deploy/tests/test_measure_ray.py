"""The costs of Ray are measured on a real fleet; `make test-deploy` runs this."""

from __future__ import annotations

import json

import pytest

from bench.fleet import measure_ray


def test_the_costs_of_ray_are_measured(capfd: pytest.CaptureFixture[str]) -> None:
    """Here the steps of a tiny model cost less than the table says, and so a request may seem to cost nothing."""
    assert measure_ray.main(["--quick", "--replicas", "2"]) == 0
    costs = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert 0 <= costs.pop("ray_request") < 1
    assert 0 < costs.pop("ray_idle_cores") < 2
    assert not costs
