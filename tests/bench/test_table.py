"""Tests of the report: medians of ratios, alternating runs, the format of the table, and the JSON in the last line."""

from __future__ import annotations

import json

import pytest

from bench.table import Bar, Report, Sample, format_table, interleave


def test_a_ratio_is_the_median_of_the_ratios_of_pairs() -> None:
    # The second round was slow for both.
    ratio = Sample((1.0, 10.0, 1.2)).over(Sample((2.0, 20.0, 2.0)))
    assert ratio.values == (0.5, 0.5, 0.6)
    assert ratio.median == 0.5
    assert ratio.spread() == "0.5 .. 0.6"


def test_samples_with_different_numbers_of_rounds_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Sample((1.0, 2.0)).over(Sample((1.0,)))


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.0), (75, 3.0), (76, 4.0), (99, 4.0), (100, 4.0)])
def test_a_percentile_is_a_measured_value(percent: float, expected: float) -> None:
    assert Sample((4.0, 1.0, 3.0, 2.0)).percentile(percent) == expected


def test_runs_alternate() -> None:
    order: list[str] = []

    def run(name: str, value: float) -> float:
        order.append(name)
        return value

    rounds = ({"a": lambda i=i: run("a", i), "b": lambda i=i: run("b", -i)} for i in (1, 2, 3))
    samples = interleave(rounds)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert samples == {"a": Sample((1, 2, 3)), "b": Sample((-1, -2, -3))}


@pytest.mark.parametrize(
    ("bar", "is_met"),
    [
        (Bar(name="x", value=1.0, at_least=1.0), True),
        (Bar(name="x", value=0.99, at_least=1.0), False),
        (Bar(name="x", value=1.0, at_most=1.0), True),
        (Bar(name="x", value=1.01, at_most=1.0), False),
    ],
)
def test_a_bar_is_met_at_its_limit(bar: Bar, is_met: bool) -> None:
    assert bar.is_met is is_met
    assert str(bar).startswith("met" if is_met else "MISSED")


def test_text_is_aligned_left_and_numbers_right() -> None:
    table = format_table([{"what": "decode", "ms": 1.25}, {"what": "x", "ms": 12345.6, "note": "late"}])
    assert table.splitlines() == [
        "what        ms  note",
        "decode    1.25",
        "x       12,346  late",
    ]


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("Title", {"shots": 8})
    report.add({"what": "decode", "ms": 2.0})
    report.bars.append(Bar(name="fast", value=2.0, at_most=3.0))
    report.print()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Title"
    last = json.loads(lines[-1])
    assert last["rows"] == [{"what": "decode", "ms": 2.0}]
    assert last["bars"] == [{"name": "fast", "value": 2.0, "at_least": None, "at_most": 3.0, "is_met": True}]
    assert last["settings"] == {"shots": 8}
    assert {"processor", "threads", "torch", "commit", "load before"} <= last["machine"].keys()


def test_a_column_can_head_tables_of_their_own_columns(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("Title", {})
    report.add({"study": "a", "x": 1})
    report.add({"study": "b", "y": 2})
    report.add({"study": "a", "x": 3})
    report.print(heading="study")
    output = capsys.readouterr().out
    assert "\n\na\nx\n1\n3\n\nb\ny\n2\n\n" in output
    assert json.loads(output.splitlines()[-1])["rows"][1] == {"study": "b", "y": 2}
