"""Tests of the tables of costs: what a step costs, and which files are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.fleet.costs import FILE, CostsError, interpolate, load, load_all, mean, save
from bench.fleet.measuring import ALONE, SHARED
from tests.bench.fleet.fleets import COSTS


def test_a_step_reads_the_weights_once() -> None:
    assert COSTS.forward(1, 0) == pytest.approx(0.005)
    assert COSTS.forward(0, 16) == pytest.approx(0.012)
    assert COSTS.forward(8, 16) == pytest.approx(0.012 + 0.012 - 0.005)
    assert COSTS.forward(0, 0) == 0.0


def test_values_between_and_beyond_the_points_are_on_straight_lines() -> None:
    points = ((1, 1.0), (3, 2.0), (5, 6.0))
    assert [interpolate(points, at) for at in (1, 2, 3, 4, 5, 7)] == [1.0, 1.5, 2.0, 4.0, 6.0, 10.0]


def test_images_and_pages_cost_their_seconds_and_their_transfer() -> None:
    assert COSTS.media(3, 2) == pytest.approx(3 * 0.02 + 3 * 0.002 + 2 * 0.002)
    assert COSTS.media(0, 0) == 0.0


def test_a_table_is_read_as_it_was_written_and_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    other = replace(COSTS, page=0.5, conditions={"processor": "imagined"})
    save(file, "first", COSTS)
    save(file, "second", other)
    assert load(file, "first") == COSTS
    assert load(file, "second") == other


def test_the_mean_of_tables_is_that_of_each_cost() -> None:
    slower = replace(COSTS, request=0.010, decode=((1, 0.007), (8, 0.014)))
    table = mean([COSTS, slower])
    assert table.request == pytest.approx(0.009)
    assert dict(table.decode) == pytest.approx({1: 0.006, 8: 0.013})
    assert table.images == COSTS.images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"1": 0.1}}, "images needs the seconds of at least two counts"),
        ({"is_measured": "yes"}, "is_measured must be true or false"),
        ({"speed": 1}, "speed"),
    ],
)
def test_a_wrong_table_is_refused_with_the_reason(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    save(file, "first", COSTS)
    fields = json.loads(file.read_text())["first"]
    file.write_text(json.dumps({"first": {**fields, **change}}))
    with pytest.raises(CostsError, match=message):
        load(file, "first")


def test_a_table_that_a_file_lacks_is_named_with_those_that_it_has(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    save(file, "first", COSTS)
    with pytest.raises(CostsError, match="no table 'second'; it has 'first'"):
        load(file, "second")


def test_the_committed_tables_are_measured_and_name_their_machine() -> None:
    tables = load_all(FILE)
    assert {ALONE, SHARED} <= tables.keys()
    for table in tables.values():
        assert table.is_measured
        assert {"processor", "cores", "threads", "torch", "commit", "time"} <= table.conditions.keys()
        seconds = [value for points in (table.decode, table.prompt, table.images) for _, value in points]
        assert min(*seconds, table.request) > 0


def test_requests_through_ray_have_their_own_cost_which_must_be_measured() -> None:
    assert COSTS.through_ray().request == COSTS.ray_request
    with pytest.raises(CostsError, match="--measure-ray"):
        replace(COSTS, ray_request=0.0).through_ray()
