"""Tests that docs/evaluation.md lists the benchmarks as their data have them."""

from __future__ import annotations

import re
from pathlib import Path

from evaluation.benchmarks.benchmark import load, names
from evaluation.benchmarks.scoring import METRICS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_page_has_a_row_for_each_benchmark() -> None:
    section = PAGE.partition("## The sets\n")[2].partition("\n- ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    documented = {row[0].strip("`"): row[1:4] for row in rows if row[0].startswith("`")}
    actual = {
        name: [METRICS[benchmark.metric].title, benchmark.split, benchmark.paper_split]
        for name in names()
        for benchmark in [load(name)]
    }
    assert documented == actual


def test_the_page_states_the_metrics() -> None:
    documented = re.findall(r"^\| ([^|`]+?) \| (?:own code|equal|scikit-learn|nltk)", PAGE, flags=re.MULTILINE)
    stated = {title for cell in documented for title in cell.split(", ")}
    assert stated == {metric.title for metric in METRICS.values()} - {"mean of top-1 and top-5 accuracy"}
