"""The benchmark at toy sizes: all six stages run on a processor, agree with the references, and say so last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.bench.__main__ import main
from kernels.bench.contenders import as_rows
from kernels.bench.measure import Report, Row, Stopwatch, Timing
from kernels.bench.sizes import OF_3B, OF_9B
from kernels.bench.variants import VARIANTS
from kernels.configs import load


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_all_stages_run_and_the_table_comes_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--toy", "--out", str(tmp_path / "bench.json"), "--launches", str(tmp_path / "launches.json")])
    written = json.loads((tmp_path / "bench.json").read_text())
    rows = written["rows"]
    assert [stage[0] for stage in dict.fromkeys(row["stage"] for row in rows)] == list("123456")
    assert [row for row in rows if "WRONG" in row["note"]] == []
    refused = {(row["stage"][0], row["who"]) for row in rows if row["value"] is None}
    assert refused == {(stage, who) for stage in "23" for who in VARIANTS}  # by name, in the table
    assert {row["note"] for row in rows if row["value"] is None} == {
        "refused: a variant of the kernel runs on a GPU only"
    }
    assert {row["value"] for row in rows if "a row's bits" in row["what"]} == {1.0}
    assert written["about"]["sizes"] == "toy"
    load(tmp_path / "launches.json")  # no kernel ran, so no row is faster
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert "and the text; a new image" in last


def test_a_refusal_is_a_row_and_a_stage_out_of_time_says_so() -> None:
    def refuse() -> Timing:
        raise RuntimeError("no such kernel\nlong story")

    report = Report()
    assert report.timed("s", "w", "other", 1.0, refuse) is None
    with report.stage(0.0):
        assert report.timed("s", "w", "ours", 1.0, lambda: Timing(2.0, 0.0, "cpu")) is None
    assert report.timed("s", "w", "ours", 1.0, lambda: Timing(2.0, 0.0, "cpu")) is not None
    assert [row.note for row in report.rows] == ["refused: no such kernel", "out of time", "cpu, spread 0%"]
    assert report.rows[-1].of_floor == 0.5


def test_a_time_is_a_call_s_and_not_that_of_all() -> None:
    calls: list[int] = []
    timing = Stopwatch(torch.device("cpu"), replays=3).time([lambda: calls.append(0)] * 4)
    assert len(calls) == 4 + 2 * 3 * 4
    assert timing.how == "cpu"
    assert timing.microseconds > 0


def test_the_line_of_a_row_names_the_bound() -> None:
    assert "50% of the bound" in Row("s", "what", "who", 4.0, floor=2.0).line()


def test_the_sizes_are_those_of_the_models() -> None:
    """OF-3B reads 4.33 GB of weights a decode step, OF-9B 15.5; a token's text takes 192 and 512 KiB."""
    assert round(2 * OF_3B.step_params / 1e9, 2) == 4.33
    assert round(2 * OF_9B.step_params / 1e9, 1) == 15.5
    assert (OF_3B.text_bytes, OF_9B.text_bytes) == (192 << 10, 512 << 10)
    assert (OF_3B.media_bytes, OF_9B.media_bytes) == (3 << 20, 1 << 20)


def test_the_packed_contenders_read_the_pool_where_it_lies() -> None:
    pages = torch.randn(4, 3, 2, 8, 16)
    key, value = as_rows(pages)
    for page in range(4):
        rows = slice(2 * 3 * 8 * page, 2 * 3 * 8 * page + 8)
        assert torch.equal(key[rows].transpose(0, 1), pages[page, :, 0])
        assert torch.equal(value[rows].transpose(0, 1), pages[page, :, 1])
    assert key.data_ptr() == pages.data_ptr()
