"""What the load tools are told and how their reports are read, with a tool that only writes a report in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.drive import BenchFailed
from bench.load_tools import CASES, QUICK, TOOLS, Case, Load, _parser, install, run
from bench.options import parse, shown

LOAD = Load(
    url="http://127.0.0.1:1",
    model="tiny",
    tokenizer=Path("/models/tiny"),
    requests=4,
    clients=2,
    prompt_tokens=16,
    new_tokens=8,
)
IMAGES = Case(route="chat/completions", images=2, is_stream=True)
GUIDELLM = {
    "benchmarks": [
        {
            "metrics": {
                "request_totals": {"successful": 3, "errored": 1},
                "request_latency": {"successful": {"median": 0.5}},
                "time_to_first_token_ms": {"successful": {"median": 20.0}},
            }
        }
    ]
}
AIPERF = {
    "request_count": {"avg": 3.0},
    "completed_request_count": {"avg": 4.0},
    "request_latency": {"p50": 500.0},
    "time_to_first_token": {"p50": 20.0},
}


def fake(folder: Path, file: str, report: dict[str, Any], status: int = 0) -> Path:
    """A tool that writes where it is told to, and ends."""
    binary = folder / "tool"
    code = (
        f"#!{sys.executable}\nimport pathlib, sys\n"
        f"pathlib.Path({file!r}).write_text({json.dumps(report)!r})\nprint('out of luck')\nsys.exit({status})\n"
    )
    binary.write_text(code)
    binary.chmod(0o755)
    return binary


@pytest.mark.parametrize(
    ("tool", "file", "report"),
    [("guidellm", "report.json", GUIDELLM), ("aiperf", "profile_export_aiperf.json", AIPERF)],
)
def test_a_row_is_what_the_tool_counted(tool: str, file: str, report: dict[str, Any], tmp_path: Path) -> None:
    row = run(tool, fake(tmp_path, file, report), IMAGES, LOAD)
    assert row == {"answered": 3, "failed": 1, "latency ms": 500.0, "first token ms": 20.0}


def test_a_tool_that_fails_is_heard(tmp_path: Path) -> None:
    with pytest.raises(BenchFailed, match="out of luck"):
        run("aiperf", fake(tmp_path, "x", {}, status=3), IMAGES, LOAD)


def test_a_tool_that_is_there_is_not_installed_again(tmp_path: Path) -> None:
    (tmp_path / "guidellm" / "bin").mkdir(parents=True)
    binary = fake(tmp_path / "guidellm" / "bin", "x", {}).rename(tmp_path / "guidellm" / "bin" / "guidellm")
    assert install("guidellm", tmp_path) == binary


@pytest.mark.parametrize("tool", TOOLS)
def test_a_case_is_asked_for_as_it_is(tool: str) -> None:
    command, _ = TOOLS[tool]
    spoken = [" ".join(command(case, LOAD, Path("/out"))) for case in CASES]
    assert len(set(spoken)) == len(CASES)
    for case, line in zip(CASES, spoken, strict=True):
        assert LOAD.url in line
        assert str(LOAD.tokenizer) in line
        assert ("image" in line) == bool(case.images)
        assert ("--streaming" in line or "stream=true" in line) == case.is_stream


@pytest.mark.parametrize(("tools", "meant"), [([], []), (["aiperf"], ["aiperf"])])
def test_what_it_is_told_stands_in_its_last_line(tools: list[str], meant: list[str]) -> None:
    options = parse(_parser(), [*tools, "--requests", "3"], QUICK)
    told = json.loads(json.dumps(shown(options)))
    assert (told["tools"], told["requests"]) == (meant, 3)
