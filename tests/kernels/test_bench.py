"""Tests of the kernel benchmark at toy sizes: all six stages run on a CPU and agree with the references."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.backend import load_launches
from kernels.bench.__main__ import main
from kernels.bench.contenders import as_rows
from kernels.bench.measure import Report, Row, Stopwatch, Timing
from kernels.bench.sizes import OF_3B, OF_9B
from kernels.bench.variants import VARIANTS


@pytest.fixture
def single_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("single_thread")
def test_all_stages_run_and_the_table_is_printed_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--toy", "--out", str(tmp_path / "bench.json"), "--launches", str(tmp_path / "launches.json")])
    written = json.loads((tmp_path / "bench.json").read_text())
    rows = written["rows"]
    assert [stage[0] for stage in dict.fromkeys(row["stage"] for row in rows)] == list("123456")
    assert [row for row in rows if "WRONG" in row["note"]] == []
    rejected = {(row["stage"][0], row["name"]) for row in rows if row["value"] is None}
    assert rejected == {(stage, name) for stage in "23" for name in VARIANTS}
    assert {row["note"] for row in rows if row["value"] is None} == {
        "rejected: the variants of the kernel run only on a GPU"
    }
    assert {row["value"] for row in rows if "bits of a row" in row["case"]} == {1.0}
    assert written["about"]["sizes"] == "toy"
    load_launches(tmp_path / "launches.json")  # no kernel ran, so no row is faster
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert "all but a new image cached" in last


def test_a_rejected_implementation_and_a_stage_out_of_time_add_rows() -> None:
    def reject() -> Timing:
        raise RuntimeError("no such kernel\ndetails")

    report = Report()
    assert report.timed("stage", "case", "other", 1.0, reject) is None
    with report.stage(0.0):
        assert report.timed("stage", "case", "ours", 1.0, lambda: Timing(2.0, 0.0, "cpu")) is None
    assert report.timed("stage", "case", "ours", 1.0, lambda: Timing(2.0, 0.0, "cpu")) is not None
    assert [row.note for row in report.rows] == ["rejected: no such kernel", "out of time", "cpu, spread 0%"]
    assert report.rows[-1].of_bound == 0.5


def test_a_timing_is_per_call() -> None:
    calls: list[int] = []
    timing = Stopwatch(torch.device("cpu"), replays=3).time([lambda: calls.append(0)] * 4)
    assert len(calls) == 4 + 2 * 3 * 4
    assert timing.method == "cpu"
    assert timing.microseconds > 0


def test_the_line_of_a_row_states_the_share_of_the_bound() -> None:
    assert "50% of the bound" in Row("stage", "case", "name", 4.0, bound=2.0).line()


def test_the_sizes_match_the_models() -> None:
    """OF-3B reads 4.33 GB of weights per decode step, OF-9B 15.5; the text cache takes 192 and 512 KiB per token."""
    assert round(2 * OF_3B.step_params / 1e9, 2) == 4.33
    assert round(2 * OF_9B.step_params / 1e9, 1) == 15.5
    assert (OF_3B.text_bytes, OF_9B.text_bytes) == (192 << 10, 512 << 10)
    assert (OF_3B.media_bytes, OF_9B.media_bytes) == (3 << 20, 1 << 20)


def test_the_packed_contenders_read_the_pool_without_a_copy() -> None:
    pages = torch.randn(4, 3, 2, 8, 16)
    key, value = as_rows(pages)
    for page in range(4):
        rows = slice(2 * 3 * 8 * page, 2 * 3 * 8 * page + 8)
        assert torch.equal(key[rows].transpose(0, 1), pages[page, :, 0])
        assert torch.equal(value[rows].transpose(0, 1), pages[page, :, 1])
    assert key.data_ptr() == pages.data_ptr()
