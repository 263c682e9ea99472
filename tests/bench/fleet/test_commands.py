"""Tests that the commands of `bench.fleet` run at toy sizes, and that the page has their tables."""

from __future__ import annotations

import json
import math
import operator
import re
from functools import partial
from pathlib import Path

import pytest

from bench.fleet import __main__ as command
from bench.fleet import pictures
from bench.fleet.costs import FILE, save
from bench.fleet.measuring import ALONE, SHARED
from bench.fleet.page import PAGE, with_tables
from bench.fleet.studies import STUDIES, cost_per_million, smallest_that
from tests.bench.fleet.fleets import COSTS


@pytest.fixture
def costs_file(tmp_path: Path) -> Path:
    file = tmp_path / "costs.json"
    for name in (ALONE, SHARED):
        save(file, name, COSTS)
    return file


def test_all_studies_run_and_their_pictures_can_be_drawn(
    costs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--quick", "--costs-file", str(costs_file)]) == 0
    output = capsys.readouterr().out
    report = json.loads(output.splitlines()[-1])
    assert report["settings"]["costs are"] == "hypothetical"
    for name in STUDIES:
        rows = [row for row in report["rows"] if row["study"] == name]
        assert rows
        assert f"\n{name}\n" in output
        assert all(0 <= row["hit rate"] <= 1 for row in rows if "hit rate" in row)
        picture = pictures.draw(name, rows, tmp_path)
        assert picture.read_text(encoding="utf-8").count("<svg") == 1


def test_the_hit_rates_of_the_study_of_caches_are_near_ches(
    costs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["caches", "--quick", "--costs-file", str(costs_file)])
    for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]:
        assert row["random"] == pytest.approx(row["Che, random"], abs=0.1)  # of few requests
        assert row["affinity"] == pytest.approx(row["Che, affinity"], abs=0.1)


def test_the_prediction_of_the_real_run_is_printed(costs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--predict-ray", "--quick", "--costs-file", str(costs_file)]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["policy"] for row in rows] == ["affinity", "round_robin", "random"]
    for row in rows:
        assert 0 < row["warm ms"] < row["cold ms"]
        assert row["pages hit"] <= row["images not encoded"]


def test_one_replica_is_compared_with_a_real_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--check", "--quick"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["what"]: row for row in report["rows"]}
    assert rows.keys() == {"tokens cached", "pages cached", *(f"first token, {of} s" for of in ("mean", "p50", "p95"))}
    # a tiny model has a token per byte, so more of them are cached than a set of the default model has
    assert 0 < rows["pages cached"]["measured"] <= 1
    assert all(row["simulated"] > 0 and row["measured"] > 0 for row in rows.values())


def test_the_example_of_another_machine_is_read_and_called_hypothetical(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(FILE.with_name("hypothetical_gpu.json"))
    assert command.main(["caches", "--quick", "--costs-file", file, "--costs", "hypothetical GPU"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["settings"]["costs are"] == "hypothetical"
    assert report["settings"]["warm request ms"] < report["settings"]["cold request ms"] < 1000


def test_a_missing_table_ends_the_command_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--costs-file", str(tmp_path / "none.json")]) == 2
    assert "none.json is not a table of costs" in capsys.readouterr().err


def test_an_unknown_study_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["replica"])
    assert "unknown studies: replica; the studies are replicas, caches" in capsys.readouterr().err


def test_tables_replace_the_blocks_of_their_names() -> None:
    page = "before\n```text a\nold\n```\nbetween\n```text b\nold\n```\nafter"
    written = with_tables(page, {"b": [{"x": 1}]})
    assert written == "before\n```text a\nold\n```\nbetween\n```text b\nx\n1\n```\nafter"
    with pytest.raises(ValueError, match="0 blocks that begin with ```text c"):
        with_tables(page, {"c": [{"x": 1}]})


def test_the_page_has_a_table_and_a_picture_per_study() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"```text (\w+)\n", text) == [*STUDIES, "prediction"]
    for name in STUDIES:
        assert f"](scale/{name}.svg)" in text
        assert (command.PICTURES / f"{name}.svg").exists()


def test_the_smallest_number_that_is_enough_is_found() -> None:
    for smallest in (1, 2, 7, 399, 400):
        assert smallest_that(partial(operator.le, smallest), 1, 400) == smallest
    assert smallest_that(lambda number: False, 1, 400) is None


def test_a_million_requests_cost_the_hours_of_the_replicas() -> None:
    # 36 replicas for a price of 1 per hour serve 10 requests per second: 100,000 seconds for a million
    assert math.isclose(cost_per_million(36, 1.0, 10.0), 36 * 100_000 / 3600)
